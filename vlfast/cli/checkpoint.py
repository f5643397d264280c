"""`vlfast checkpoint`: import a checkpoint of another code, or export a run to its format."""

from __future__ import annotations

import argparse
from typing import Any

from vlfast.cli.options import Parser, config_options
from vlfast.errors import VlfastError, unknown_name

HELP = "import a checkpoint of CoOp's, MaPLe's, ... code, or export a run to it"

_USAGE = """\
usage: vlfast checkpoint import FILE --output DIR --model NAME --data NAME [options]
       vlfast checkpoint export RUN --output DIR [--checkpoint last|best]

  import  make a run of a model.pth.tar-* of CoOp, CoCoOp, KgCoOp, ProGrad, VPT, IVLP, MaPLe,
          PromptSRC, KDPL, MoPD or PromptKD
  export  write a run's prompts where such code looks for them"""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    actions = {"import": _import, "export": _export}
    if argv[0] not in actions:
        raise unknown_name("checkpoint command", argv[0], actions)
    actions[argv[0]](argv[1:])


def _import(argv: list[str]) -> None:
    options = config_options(
        argv, "checkpoint import", "make a run of another code's checkpoint", _import_arguments
    )
    given: dict[str, Any] = options["given"]
    if options["file"] is None:
        raise VlfastError("checkpoint import: expected a file or folder; see --help")
    if "output" not in given:
        raise VlfastError("--output: expected the folder that the run goes to")
    epoch = options["epoch"]
    if epoch is not None and epoch != "best" and not epoch.isdecimal():
        raise VlfastError(f"--epoch: expected a number or best, got {epoch!r}")
    from vlfast.checkpoints.importing import import_checkpoint

    recipe = dict(given.pop("recipe", {}))
    run = import_checkpoint(
        options["file"],
        given.pop("output"),
        recipe=recipe.pop("name", None),
        epoch=epoch,
        **given,
        **recipe,
    )
    prompts = run.config.prompts
    counts = {
        "context tokens": prompts.n_ctx,
        "tokens in the image tower": prompts.n_visual,
    }
    held = ", ".join(f"{count} {what}" for what, count in counts.items() if count is not None)
    print(f"{run.config.recipe.name}: {prompts.kind} prompts, {held or 'no tokens'}")
    print(f"run: {run.folder.path} (vlfast evaluate {run.folder.path} tests it)")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", help="model.pth.tar-EPOCH, or a folder of such")
    parser.add_argument("--epoch", help="of a folder: a number, or best")


def _export(argv: list[str]) -> None:
    parser = Parser("vlfast checkpoint export", description="write a run in others' format")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--output", required=True, help="what their --model-dir wants")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    from vlfast.checkpoints.exporting import export_checkpoint

    file = export_checkpoint(
        options.run, options.output, checkpoint=options.checkpoint, device=options.device
    )
    print(f"checkpoint: {file}")
