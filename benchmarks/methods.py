"""Every recipe on icons, base-to-new, over seeds: the table in docs/methods.md.

    python -m benchmarks.methods --jobs 2

Each recipe and seed is a run of its own (`vlfast train`), in processes of one thread each. Finished
runs are not run again, stopped ones go on. PromptKD has two stages: its teacher is a run, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from vlfast.evaluation.metrics import harmonic_mean
from vlfast.trainers.recipes import RECIPES
from vlfast.trainers.run_folder import RunFolder

TEACHER = "promptkd-teacher"


def write_dictionary(path: Path) -> None:
    """The names of all glyphs in the demo's fonts of which the teacher and the student know every
    word: what class-agnostic KDPL draws its class names from."""
    from vlfast.clip.models import load_clip
    from vlfast.data.glyphs.fonts import UNSEEN_FONTS, human_words, read_glyphs

    names = {" ".join(human_words(glyph.drawing)) for glyph in read_glyphs(UNSEEN_FONTS)}
    models = [load_clip(f"glyphs-{size}") for size in ("student", "teacher")]
    known = [n for n in sorted(names) if n and not any(m.unknown_words(n) for m in models)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(known) + "\n", encoding="utf-8")


def options_of(recipe: str, theme: str, seed: int, root: Path) -> list[str]:
    """The command-line options of one run."""
    folder = str(root / f"{recipe}-seed{seed}")
    options = ["--data", f"glyphs/{theme}", "--data.classes", "base", "--seed", str(seed)]
    if recipe == TEACHER:
        # Stage one. The large model's image tower is a ResNet, which takes no tokens: KgCoOp.
        options += ["--recipe", "kgcoop", "--model", "glyphs-teacher"]
    else:
        options += ["--recipe", recipe, "--model", "glyphs-student"]
    if recipe == "kdpl-ca":
        options += ["--data.dictionary", str(root / "dictionary.txt")]
    if recipe == "promptkd":
        options += ["--teacher.run", str(root / f"{TEACHER}-seed{seed}")]
    return [*options, "--model.device", "cpu", "--output", folder]


def run_once(recipe: str, theme: str, seed: int, root: Path) -> None:
    folder = root / f"{recipe}-seed{seed}"
    if (folder / "result.json").is_file():
        return
    command = [sys.executable, "-m", "vlfast", "train"]
    if (folder / "config.yaml").is_file():
        command += ["--resume", str(folder)]
    else:
        command += options_of(recipe, theme, seed, root)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{recipe}, seed {seed}: {said[-1]}")
    print(f"{recipe}, seed {seed}: done", file=sys.stderr, flush=True)


def fastest_epoch(folder: Path) -> float:
    """Seconds; infinite where nothing was trained."""
    ends = [0.0, *(row["seconds"] for row in RunFolder(folder).read_metrics())]
    return min((after - before for before, after in pairwise(ends)), default=math.inf)


def table(recipes: Sequence[str], seeds: Sequence[int], root: Path) -> str:
    """Markdown: means over seeds with the standard deviation; the harmonic mean is that of the mean
    base and the mean new accuracy, as in the papers. "Other hands": the mean harmonic mean on
    drawings of other families. An epoch's seconds are those of the fastest, since runs share the
    machine."""
    lines = [
        "| recipe | base | new | harmonic mean | other hands | epochs | seconds an epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        results = [
            json.loads((root / f"{recipe}-seed{seed}" / "result.json").read_text())
            for seed in seeds
        ]
        cells = [recipe]
        means = {}
        for part in ("base", "new"):
            values = [result["accuracy"][part]["accuracy"] for result in results]
            means[part] = statistics.mean(values)
            cells.append(f"{means[part]:.1f} ± {statistics.pstdev(values):.1f}")
        cells.append(f"{harmonic_mean(**means):.1f}")
        others = [
            scores["harmonic_mean"]
            for result in results
            for scores in result["accuracy"]["domains"].values()
        ]
        cells.append(f"{statistics.mean(others):.1f}")
        cells.append(str(results[0]["epochs"]))
        fastest = min(map(fastest_epoch, (root / f"{recipe}-seed{seed}" for seed in seeds)))
        cells.append("-" if fastest == math.inf else f"{fastest:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=[TEACHER, *RECIPES])
    parser.add_argument("--theme", default="tools", help="which icons")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    options = parser.parse_args()
    if options.fresh and options.output.is_dir():
        shutil.rmtree(options.output)
    if "kdpl-ca" in options.recipes:
        write_dictionary(options.output / "dictionary.txt")
    # Teachers first: PromptKD's second stage needs them.
    for stage in (
        [r for r in options.recipes if r == TEACHER],
        [r for r in options.recipes if r != TEACHER],
    ):
        cells = [(recipe, seed) for seed in options.seeds for recipe in stage]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda c: run_once(c[0], options.theme, c[1], options.output), cells))
    print(table(options.recipes, options.seeds, options.output))


if __name__ == "__main__":
    main()
