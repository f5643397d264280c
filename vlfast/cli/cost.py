"""`vlfast cost`: measure what recipes cost: parameters, time, memory, speed at test."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlfast.cli.options import Parser, read_yaml
from vlfast.errors import VlfastError

HELP = "measure what recipes cost: parameters, time, memory, speed at test"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast cost", description=HELP)
    parser.add_argument("recipes", nargs="*", help="by default all of them")
    parser.add_argument(
        "--model",
        default="ViT-B-16",
        help="any name of open_clip, with random weights, or a bundled model",
    )
    parser.add_argument("--teacher", help="of recipes that need one; by default as --model")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="instead of the recipes' own")
    parser.add_argument("--steps", type=int, default=5, help="how many are timed")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options over the recipes'")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="write .csv, .md or .json too")
    options = parser.parse_args(argv)
    kinds = (".csv", ".md", ".json")
    if options.output and Path(options.output).suffix not in kinds:
        raise VlfastError(f"--output: expected a .csv, .md or .json file, got {options.output}")
    from vlfast import cost
    from vlfast.trainers.config import merge_options

    given: dict[str, Any] = {"model": {"device": options.device}}
    if options.batch_size is not None:
        given["recipe"] = {"batch_size": options.batch_size}
    if options.config:
        given = merge_options(read_yaml(options.config), given)
    costs = cost.compare_costs(
        options.recipes or None,
        model=options.model,
        classes=options.classes,
        teacher=options.teacher,
        options=given,
        steps=options.steps,
        report=lambda one: print(
            f"{one.recipe} {'failed' if one.failed else 'measured'}", file=sys.stderr
        ),
    )
    about = cost.about(costs, options.model, options.classes)
    if options.output:
        cost.write_costs(costs, options.output, about)
    if options.json:
        print(json.dumps([asdict(one) for one in costs], indent=2))
    else:
        print(f"{cost.cost_table(costs)}\n{about}")
