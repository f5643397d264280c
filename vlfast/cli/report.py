"""`vlfast report`: tables and pictures of finished runs."""

from __future__ import annotations

import shutil
import sys

from vlfast.cli.options import Parser

HELP = "tables, plots and one HTML file of finished runs"


def main(argv: list[str]) -> None:
    parser = Parser("vlfast report", description=HELP)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders that hold runs")
    parser.add_argument(
        "--output", metavar="OUT", help="the report's folder; by default report in the first DIR"
    )
    parser.add_argument(
        "--published", action="store_true", help="the papers' own numbers below ours"
    )
    parser.add_argument(
        "--protocol",
        metavar="P",
        help="only few-shot, base-to-new, cross-dataset or domain-generalization",
    )
    parser.add_argument("--macro-f1", action="store_true", help="tables of macro-F1 too")
    parser.add_argument(
        "--format",
        nargs="+",
        metavar="F",
        help="only these of md, csv, tex, png and html; by default all",
    )
    options = parser.parse_args(argv)
    from vlfast.report.report import FORMATS, write_report
    from vlfast.report.table import as_text

    report = write_report(
        options.folders,
        options.output,
        published=options.published,
        protocol=options.protocol,
        macro_f1=options.macro_f1,
        formats=options.format or FORMATS,
    )
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    print("\n\n".join(as_text(table, width) for table in report.tables))
    print()
    for file in report.files:
        print(f"wrote {file}")
    for note in report.notes:
        print(f"vlfast: {note}", file=sys.stderr)
