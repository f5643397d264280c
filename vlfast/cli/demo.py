"""`vlfast demo`: train zero-shot, CoOp and CoOp+PLPP on icons, and show the difference."""

from __future__ import annotations

from vlfast.cli.options import Parser

HELP = "train zero-shot, CoOp and CoOp+PLPP on icons, and show the difference"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast demo", description=HELP)
    parser.add_argument("--theme", default="tools", help="which icons")
    parser.add_argument("--output", default="runs/demo", help="where runs and pictures go")
    parser.add_argument("--epochs", type=int, help="instead of the recipes' own")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    from vlfast.demo import run_demo

    run_demo(options.theme, options.output, epochs=options.epochs, seed=options.seed)
