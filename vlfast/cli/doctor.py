"""`vlfast doctor`: say what is installed, which backend serves which op, and what would help."""

from __future__ import annotations

from vlfast.cli.options import Parser

HELP = "say what is installed, which backend serves which op, and what would help"


def main(argv: list[str]) -> None:
    Parser("vlfast doctor", description=HELP).parse_args(argv)
    from vlfast.doctor import print_report

    print_report()
