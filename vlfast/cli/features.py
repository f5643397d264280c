"""`vlfast features`: store what the frozen models make of the training images, to train from."""

from __future__ import annotations

import argparse

from vlfast.cli.options import config_options
from vlfast.errors import VlfastError

HELP = "store what the frozen models make of the training images, to train from"


def main(argv: list[str]) -> None:
    from vlfast.features import write_features
    from vlfast.trainers.recipes import resolve_config

    options = config_options(argv, "features", HELP, features_arguments)
    given = options["given"]
    if options["views"] is not None:
        given = {**given, "data": {**given.get("data", {}), "views": options["views"]}}
    if "output" not in given:
        raise VlfastError("--output: expected the folder that the features go to")
    path = write_features(resolve_config(given), given["output"], dtype=options["dtype"] or "fp32")
    print(f"features: {path}")


def features_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", type=int, help="short for --data.views")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), help="what is kept on disk, fp32 by default"
    )
