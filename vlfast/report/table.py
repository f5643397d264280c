"""One table and its five forms: terminal, Markdown, LaTeX, HTML, and lists of numbers."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

MISSING = "-"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"\textdagger{}",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Cell:
    """A mean over seeds, its standard deviation, a mark that a note explains, and whether it is the
    best of those that it may be compared with. None is missing."""

    mean: float | None = None
    std: float | None = None
    mark: str = ""
    best: bool = False

    def text(self) -> str:
        if self.mean is None:
            return MISSING
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread}{self.mark}"


@dataclass(frozen=True)
class Column:
    """name: below the header that neighbours of one ``group`` share. fair: whether the cells may be
    compared with each other."""

    name: str
    group: str = ""
    fair: bool = True


@dataclass(frozen=True)
class Row:
    """labels: one for each of the table's label columns. section: rows are compared within it.
    published: somebody else's numbers, which don't compete."""

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    section: str = ""
    published: bool = False


@dataclass(frozen=True)
class Table:
    """name: for files. label_names: the headers of the rows' labels. better: which numbers are the
    best of their column. notes: what marks mean, and what is missing."""

    name: str
    title: str
    caption: str
    label_names: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    better: Literal["highest", "lowest"] = "highest"


def mark_best(table: Table) -> Table:
    """The table with the best cell of each fair column marked in each section: among at least two
    rows of our own that miss nothing, as far as the two decimals tell them apart."""
    rows = [list(row.cells) for row in table.rows]
    choose = max if table.better == "highest" else min
    for section in {row.section for row in table.rows}:
        ours = [
            i for i, row in enumerate(table.rows) if row.section == section and not row.published
        ]
        for c, column in enumerate(table.columns):
            cells = {i: rows[i][c] for i in ours}
            whole = {
                i: round(cell.mean, 2)
                for i, cell in cells.items()
                if cell.mean is not None and cell.mean == cell.mean and not cell.mark
            }
            if not column.fair or len(whole) < 2:
                continue
            best = choose(whole.values())
            for i, value in whole.items():
                rows[i][c] = replace(rows[i][c], best=value == best)
    marked = [replace(row, cells=tuple(cells)) for row, cells in zip(table.rows, rows, strict=True)]
    return replace(table, rows=tuple(marked))


def as_text(table: Table, width: int = 120) -> str:
    """For a terminal of ``width`` characters; the best of a column has a star."""
    texts = [[_starred(cell) for cell in row.cells] for row in table.rows]
    lines = [table.title, "=" * len(table.title)]
    labels = [
        max(len(name), *(len(row.labels[i]) for row in table.rows))
        for i, name in enumerate(table.label_names)
    ]
    room = width - sum(labels) - 2 * len(labels)
    widths = [
        max([len(column.name), *(len(row[c]) for row in texts)]) + 2
        for c, column in enumerate(table.columns)
    ]
    for c, column in enumerate(table.columns):  # a group's name needs room over its columns
        members = [i for i, other in enumerate(table.columns) if other.group == column.group]
        short = len(column.group) + 2 - sum(widths[i] for i in members)
        if c == members[0] and short > 0:
            widths[c] += short
    for block in _blocks(table, lambda c: widths[c], room):
        lines.append("")
        if any(table.columns[c].group for c in block):
            pieces = [
                group.rjust(sum(widths[c] for c in of_group))
                for group, of_group in _groups(table, block)
            ]
            lines.append(_label_line([""] * len(labels), labels) + "".join(pieces))
        names = "".join(table.columns[c].name.rjust(widths[c]) for c in block)
        lines.append(_label_line(table.label_names, labels) + names)
        section = table.rows[0].section if table.rows else ""
        for row in _rows_of(table, block):
            if row.section != section:
                lines.append("")
                section = row.section
            line = _label_line(row.labels, labels) + "".join(
                _starred(row.cells[c]).rjust(widths[c]) for c in block
            )
            lines.append(line)
    lines += ["", table.caption, *(f"- {note}" for note in table.notes)]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(table: Table) -> str:
    lines = [f"## {_markdown(table.title)}", "", _markdown(table.caption)]
    for block in _blocks(table, lambda c: 1, 9):
        header = [*table.label_names, *(_full_name(table.columns[c]) for c in block)]
        lines += ["", f"| {' | '.join(map(_markdown, header))} |"]
        lines.append("|" + " --- |" * len(table.label_names) + " ---: |" * len(block))
        for row in _rows_of(table, block):
            cells = [
                f"**{c.text()}**" if c.best else c.text() for c in (row.cells[i] for i in block)
            ]
            lines.append(f"| {' | '.join([*map(_markdown, row.labels), *cells])} |")
    if table.notes:
        lines += ["", *(f"- {_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def as_latex(table: Table) -> str:
    """A table* with booktabs; wide ones as several tabulars, one below the other."""
    label = f"tab:{table.name}"
    lines = [r"\begin{table*}", r"\centering", rf"\caption{{{latex_escape(table.title)}. "]
    lines[-1] += rf"{latex_escape(table.caption)}}}\label{{{label}}}"
    blocks = list(_blocks(table, lambda c: 1, 9))
    for number, block in enumerate(blocks):
        lines += [r"\medskip"] if number else []
        lines.append(rf"\begin{{tabular}}{{{'l' * len(table.label_names)}{'r' * len(block)}}}")
        lines.append(r"\toprule")
        first = len(table.label_names)
        if any(table.columns[c].group for c in block):
            heads, rules, at = [], [], first
            for group, members in _groups(table, block):
                heads.append(rf"\multicolumn{{{len(members)}}}{{c}}{{{latex_escape(group)}}}")
                if group:
                    rules.append(rf"\cmidrule(lr){{{at + 1}-{at + len(members)}}}")
                at += len(members)
            lines += [f"{'& ' * first}{' & '.join(heads)} \\\\", " ".join(rules)]
        names = [*table.label_names, *(table.columns[c].name for c in block)]
        lines += [" & ".join(map(latex_escape, names)) + r" \\", r"\midrule"]
        section = table.rows[0].section if table.rows else ""
        for row in _rows_of(table, block):
            if row.section != section:
                lines.append(r"\midrule")
                section = row.section
            cells = [_latex_cell(row.cells[c]) for c in block]
            lines.append(" & ".join([*map(latex_escape, row.labels), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        text = " ".join(latex_escape(_sentence(note)) for note in table.notes)
        lines.append(rf"\par\smallskip\parbox{{0.95\linewidth}}{{\footnotesize {text}}}")
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def as_html(table: Table) -> str:
    """Tables in a <figure>, everything escaped."""
    esc = html.escape
    parts = [f'<p class="caption">{esc(table.caption)}</p>']
    for block in _blocks(table, lambda c: 1, 9):
        parts.append('<div class="wide"><table>')
        span = len(table.label_names)
        if any(table.columns[c].group for c in block):
            heads = "".join(
                f'<th colspan="{len(members)}" class="group">{esc(group)}</th>'
                for group, members in _groups(table, block)
            )
            parts.append(f'<thead><tr><td colspan="{span}"></td>{heads}</tr><tr>')
        else:
            parts.append("<thead><tr>")
        parts += [f'<th class="label">{esc(name)}</th>' for name in table.label_names]
        starts = {members[0] for _, members in _groups(table, block)}
        parts += [f"<th{_edge(c, starts)}>{esc(table.columns[c].name)}</th>" for c in block]
        parts.append("</tr></thead>")
        for _, rows in groupby(_rows_of(table, block), key=lambda row: row.section):
            parts.append("<tbody>")
            for row in rows:
                parts.append('<tr class="published">' if row.published else "<tr>")
                parts += [
                    f'<th class="label{" long" if len(label) > 20 else ""}">{esc(label)}</th>'
                    for label in row.labels
                ]
                parts += [f"<td{_edge(c, starts)}>{_html_cell(row.cells[c])}</td>" for c in block]
                parts.append("</tr>")
            parts.append("</tbody>")
        parts.append("</table></div>")
    if table.notes:
        notes = "".join(f"<li>{esc(note)}</li>" for note in table.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    return "\n".join(parts)


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _blocks(table: Table, size: Callable[[int], int], room: float) -> list[list[int]]:
    """Columns in stretches that fit, about equally wide, groups kept together."""
    whole = sum(size(c) for c in range(len(table.columns)))
    room = min(room, 1.1 * whole / -(-whole // room)) if 0 < room < whole else room
    blocks: list[list[int]] = []
    used = 0
    for _, members in _groups(table, range(len(table.columns))):
        needed = sum(size(c) for c in members)
        if not blocks or used + needed > room:
            blocks.append([])
            used = 0
        blocks[-1] += members
        used += needed
    return blocks


def _rows_of(table: Table, block: Sequence[int]) -> list[Row]:
    """All rows but published ones that have nothing in these columns."""
    there = lambda row: any(row.cells[c].mean is not None for c in block)  # noqa: E731
    return [row for row in table.rows if not row.published or there(row)]


def _groups(table: Table, columns: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Neighbours of one group; a column without is one of its own."""
    key = lambda c: (table.columns[c].group, table.columns[c].group or c)  # noqa: E731
    return [(group, list(members)) for (group, _), members in groupby(columns, key=key)]


def _full_name(column: Column) -> str:
    return f"{column.group} {column.name}".strip()


def _label_line(labels: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(label.ljust(width) for label, width in zip(labels, widths, strict=True))


def _starred(cell: Cell) -> str:
    return f"{cell.text()}{'*' if cell.best else ' '}"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _markdown(text: str) -> str:
    for sign in "\\|*_<>`[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def _latex_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "--"
    number = f"{cell.mean:.2f}"
    number = rf"\textbf{{{number}}}" if cell.best else number
    spread = "" if cell.std is None else rf" {{\scriptsize $\pm$ {cell.std:.2f}}}"
    return f"{number}{spread}{latex_escape(cell.mark)}"


def _html_cell(cell: Cell) -> str:
    if cell.mean is None:
        return f'<span class="none">{MISSING}</span>'
    number = f"{cell.mean:.2f}"
    number = f"<b>{number}</b>" if cell.best else number
    spread = "" if cell.std is None else f' <span class="std">± {cell.std:.2f}</span>'
    return f"{number}{html.escape(cell.mark)}{spread}"


def _edge(column: int, starts: set[int]) -> str:
    return ' class="edge"' if column in starts else ""
