"""`vlfast evaluate`: test a run."""

from __future__ import annotations

import json

from vlfast.cli.options import Parser, accuracy_lines

HELP = "test a run"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast evaluate", description=HELP)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--data", help="another dataset with the run's prompts")
    parser.add_argument("--data.root", dest="root", help="the folder of its images")
    parser.add_argument(
        "--data.classnames", dest="classnames", help="a file of its class names, where it has none"
    )
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from vlfast.run import load

    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    accuracy = run.evaluate(options.data, root=options.root, classnames=options.classnames)
    if options.json:
        print(json.dumps(accuracy, indent=2))
    else:
        print(accuracy_lines(accuracy))
