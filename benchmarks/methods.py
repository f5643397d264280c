"""Every recipe on icons, base-to-new, over seeds: the table in docs/methods.md.

    python -m benchmarks.methods --jobs 2

The runs are those of `vlfast run base-to-new`, in processes of one thread each. Finished runs are
not run again, stopped ones go on. PromptKD has two stages: its teacher is a run, too.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlfast.evaluation.metrics import harmonic_mean
from vlfast.protocols.results import Result, read_result
from vlfast.protocols.sweep import run_protocol
from vlfast.trainers.config import merge_options
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


def stages(recipes: Sequence[str], root: Path) -> list[tuple[list[str], Path, dict[str, Any]]]:
    """(recipes, output, options) of one protocol after the other: those that need options of their
    own by themselves, and PromptKD after its teacher."""
    alone: dict[str, tuple[str, Path, dict[str, Any]]] = {
        # Stage one. The large model's image tower is a ResNet, which takes no tokens: KgCoOp.
        TEACHER: ("kgcoop", root / TEACHER, {"model": {"name": "glyphs-teacher"}}),
        "kdpl-ca": ("kdpl-ca", root, {"data": {"dictionary": str(root / "dictionary.txt")}}),
        "promptkd": (
            "promptkd",
            root,
            {"teacher": {"run": str(root / TEACHER / "{dataset}" / "kgcoop-16shots-seed{seed}")}},
        ),
    }
    plain = [recipe for recipe in recipes if recipe not in alone]
    found = [
        ([name], output, options)
        for key, (name, output, options) in alone.items()
        if key in recipes
    ]
    return [*found, *([(plain, root, {})] if plain else [])]


def run_all(
    recipes: Sequence[str], theme: str, seeds: Sequence[int], root: Path, jobs: int
) -> dict[str, list[Result]]:
    """The finished runs by recipe. RuntimeError, after all the others, if one failed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[Result]] = {}
    failed = []
    for names, output, options in stages(recipes, root):
        model = {"name": "glyphs-student", "device": "cpu"}
        outcome = run_protocol(
            "base-to-new",
            names,
            [f"glyphs/{theme}"],
            output=output,
            seeds=seeds,
            options=merge_options({"model": model}, options),
            jobs=jobs,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        failed += [f"{cell}: {reason}" for cell, reason in outcome.failed.items()]
        for cell in outcome.done:
            recipe = TEACHER if output != root else cell.config.recipe.name
            found.setdefault(recipe, []).append(read_result(cell.folder))
    if failed:
        raise RuntimeError("; ".join(failed))
    return found


def fastest_epoch(folder: Path) -> float:
    """Seconds; infinite where nothing was trained."""
    ends = [0.0, *(row["seconds"] for row in RunFolder(folder).read_metrics())]
    return min((after - before for before, after in pairwise(ends)), default=math.inf)


def table(recipes: Sequence[str], results: Mapping[str, Sequence[Result]]) -> str:
    """Markdown: means over seeds with the standard deviation; the harmonic mean is that of the mean
    base and the mean new accuracy, as in the papers. "Other hands": the mean harmonic mean on
    drawings of other families. An epoch's seconds are those of the fastest, since runs share the
    machine."""
    lines = [
        "| recipe | base | new | harmonic mean | other hands | epochs | seconds an epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        of_recipe = results[recipe]
        cells = [recipe]
        means = {}
        for part in ("base", "new"):
            values = [result.scores[result.dataset][part]["accuracy"] for result in of_recipe]
            means[part] = statistics.mean(values)
            cells.append(f"{means[part]:.1f} ± {statistics.pstdev(values):.1f}")
        cells.append(f"{harmonic_mean(**means):.1f}")
        others = [
            scores["harmonic_mean"]
            for result in of_recipe
            for name, scores in result.scores.items()
            if name != result.dataset
        ]
        cells.append(f"{statistics.mean(others):.1f}")
        cells.append(str(of_recipe[0].epochs))
        fastest = min(fastest_epoch(result.folder) for result in of_recipe)
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
    results = run_all(options.recipes, options.theme, options.seeds, options.output, options.jobs)
    print(table(options.recipes, results))


if __name__ == "__main__":
    main()
