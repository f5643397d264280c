"""`vlfast predict`: name what images show."""

from __future__ import annotations

import json

from vlfast.cli.options import Parser

HELP = "name what images show"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast predict", description=HELP)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--classnames", help="choose among these, separated by commas")
    parser.add_argument("--top", type=int, default=3, help="how many class names an image")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    options = parser.parse_args(argv)
    from vlfast.run import load

    names = options.classnames and [n.strip() for n in options.classnames.split(",") if n.strip()]
    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    predictions = run.predict(options.images, classnames=names or None, top_k=options.top)
    for path, found in zip(options.images, predictions, strict=True):
        pairs = list(zip(found.classnames, found.probabilities, strict=True))
        if options.json:
            print(json.dumps({"image": path, "classes": [{"name": n, "p": p} for n, p in pairs]}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs))
