"""`vlfast interpret`: say what a run learned in words, and which hard prompts its gate picks."""

from __future__ import annotations

import json
from pathlib import Path

from vlfast.cli.options import Parser

HELP = "say what a run learned in words, and which hard prompts its gate picks"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast interpret", description=HELP)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--top", type=int, default=3, help="how many words a context vector")
    parser.add_argument(
        "--classes",
        type=int,
        help="how many classes at most, where there is something to show for each: 3 of "
        "class-specific contexts, 40 of a mixture",
    )
    parser.add_argument(
        "--over-training",
        action="store_true",
        help="each vector's nearest word after every epoch, as a table and as words.png",
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="which hard prompts the gate of a mixture picks for the test images of each class, "
        "as a table and as mixture.png",
    )
    parser.add_argument("--output", help="the folder of the pictures; by default the run's")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    from vlfast import interpret
    from vlfast.evaluation.plots import plot_prompt_shares, plot_word_history
    from vlfast.run import load

    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    folder = Path(options.output or options.run)
    classes = {} if options.classes is None else {"classes": options.classes}
    words = history = shares = None
    if options.over_training:
        history = interpret.words_over_training(run, **classes)
        plot_word_history(history, folder / "words.png", title=f"nearest words, {run.folder.path}")
    if options.mixture:
        shares = interpret.prompt_shares(run, checkpoint=options.checkpoint)
        title = f"hard prompts that the gate picks, {run.folder.path}"
        plot_prompt_shares(shares, folder / "mixture.png", title=title, **classes)
    if not (options.over_training or options.mixture):
        words = interpret.context_words(run, count=options.top, **classes)
    if options.json:
        print(json.dumps(interpret.as_json(words, history, shares), indent=2))
        return
    if words is not None:
        print(interpret.words_table(words))
    if history is not None:
        print(interpret.history_table(history))
        print(f"picture: {folder / 'words.png'}")
    if shares is not None:
        print(interpret.shares_table(shares, **classes))
        print(f"picture: {folder / 'mixture.png'}")
