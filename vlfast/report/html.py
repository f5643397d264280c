"""One HTML file that needs nothing else: tables, and pictures as data."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from vlfast.report.provenance import Provenance
from vlfast.report.sweeps import Sweep
from vlfast.report.table import Table, as_html
from vlfast.report.tables import table_name
from vlfast.report.worst import Worst
from vlfast.version import __version__

_DOTS = 1.35  # of a picture, to a pixel of the page, so that all have letters of one size


@dataclass(frozen=True)
class Picture:
    """A PNG and what stands above and below it."""

    file: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """All there is to a sweep. table: its protocol's. more: tables that are folded away."""

    sweep: Sweep
    provenance: Provenance
    table: Table
    more: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    worst: tuple[Worst, ...]
    confusions: Mapping[str, Picture]


def page(sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """The whole file's text. Every text that came from a run is escaped."""
    warned = [section for section in sections if section.provenance.warnings]
    links = "".join(
        f'<li><a href="#{_anchor(s)}">{escape(s.table.title)}</a></li>' for s in sections
    )
    count = sum(len(section.sweep.runs) for section in sections)
    body = [
        "<header>",
        "<h1>Results</h1>",
        f'<p class="sub">{count} run{"" if count == 1 else "s"} · vlfast {escape(__version__)}</p>',
        f"<nav><ul>{links}</ul></nav>",
        "</header>",
        *_box("note", notes),
        *(_warned(warned) if len(sections) > 1 else []),
        *(part for section in sections for part in _section(section)),
    ]
    return _PAGE.replace("STYLE", _STYLE).replace("BODY", "\n".join(body))


def _warned(sections: Sequence[Section]) -> list[str]:
    if not sections:
        return []
    links = ", ".join(
        f'<a href="#{_anchor(section)}">{escape(section.table.title)}</a>' for section in sections
    )
    return [f'<aside class="warning"><b>{_TITLES["warning"]}</b> in {links}.</aside>']


def _section(section: Section) -> list[str]:
    anchor = _anchor(section)
    parts = [f'<section id="{anchor}"><h2>{escape(section.table.title)}</h2>']
    parts += _box("warning", section.provenance.warnings)
    parts.append(as_html(section.table))
    for number, picture in enumerate(section.pictures):
        parts += _picture(picture, f"{anchor}-{number}")
    for table in section.more:
        parts.append(f'<details id="{table.name}"><summary>{escape(table.title)}</summary>')
        parts += [as_html(table), "</details>"]
    if section.worst:
        parts += _worst(section)
    parts += _about(section.provenance)
    return [*parts, "</section>"]


def _picture(picture: Picture, anchor: str) -> list[str]:
    return [
        f'<figure id="{anchor}">',
        f"<h3>{escape(picture.title)}</h3>",
        _image(picture),
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>",
    ]


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode("ascii")
    with Image.open(picture.file) as image:
        width = round(image.width / _DOTS)
    return f'<img alt="{escape(picture.title)}" width="{width}" src="data:image/png;base64,{data}">'


def _worst(section: Section) -> list[str]:
    parts = [
        "<h3>The worst classes</h3>",
        '<p class="caption">Of the most accurate method on each test set, over all seeds: percent '
        "of a class's images that each method names right, and what that method takes the others "
        "for.</p>",
    ]
    for number, worst in enumerate(section.worst):
        is_open = " open" if number == 0 else ""
        parts.append(f"<details{is_open}><summary>{escape(worst.title)}</summary>")
        parts.append('<div class="wide"><table><thead><tr><th class="label">class</th>')
        parts.append("<th>images</th>")
        label = section.sweep.label
        parts += [f"<th>{escape(label(method))}</th>" for method in worst.recalls]
        parts.append(f'<th class="label words">taken for, by {escape(label(worst.method))}</th>')
        parts.append("</tr></thead><tbody>")
        for one in worst.classes:
            recalls = [of_method.get(one.classname) for of_method in worst.recalls.values()]
            taken = ", ".join(f"{name} {share:.0f} %" for name, share in one.taken_for)
            cells = "".join(f"<td>{'-' if r is None else f'{r:.0f}'}</td>" for r in recalls)
            parts.append(
                f'<tr><th class="label">{escape(one.classname)}</th><td>{one.images}</td>'
                f'{cells}<td class="words">{escape(taken)}</td></tr>'
            )
        parts.append("</tbody></table></div>")
        if worst.title in section.confusions:
            parts.append(f"<figure>{_image(section.confusions[worst.title])}</figure>")
        parts.append("</details>")
    return parts


def _about(provenance: Provenance) -> list[str]:
    rows = "".join(
        f'<tr><th class="label">{escape(name)}</th><td class="words">{escape(text)}</td></tr>'
        for name, text in provenance.facts
    )
    parts = [
        "<h3>What was run</h3>",
        f'<div class="wide"><table class="facts">{rows}</table></div>',
    ]
    if provenance.fingerprints:
        parts.append("<details><summary>fingerprints of the images</summary>")
        parts.append('<div class="wide"><table><thead><tr><th class="label">dataset</th>')
        parts.append("<th>shots</th><th>seed</th>")
        parts.append('<th class="label words">fingerprint</th></tr></thead><tbody>')
        for draw in provenance.fingerprints:
            parts.append(
                f'<tr><th class="label">{escape(draw.dataset)}</th><td>{escape(draw.shots)}</td>'
                f'<td>{draw.seed}</td><td class="words"><code>{escape(", ".join(draw.values))}'
                "</code></td></tr>"
            )
        parts.append("</tbody></table></div></details>")
    return parts


def _box(kind: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    lines = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return [f'<aside class="{kind}"><b>{_TITLES[kind]}</b><ul>{lines}</ul></aside>']


def _anchor(section: Section) -> str:
    return table_name(section.sweep)


_TITLES = {"warning": "Not all cells are comparable", "note": "Left out"}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vlfast report</title>
<style>
STYLE
</style>
</head>
<body>
BODY
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #202124; --faint: #5f6368; --line: #dadce0;
  --paper: #fff; --soft: #f6f7f8; --link: #0b57a4; --amber: #fff4d6; --amber-line: #d9a300; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --faint: #a3a8ae; --line: #3c4043;
  --paper: #17181a; --soft: #202225; --link: #8ab4f8; --amber: #3a2f10; --amber-line: #b98a00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 28px 24px 80px; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; margin: 0; }
h2 { font-size: 21px; margin: 52px 0 6px; padding-top: 14px; border-top: 2px solid var(--line); }
h3 { font-size: 16px; margin: 30px 0 8px; }
a { color: var(--link); }
.sub, .caption, figcaption { color: var(--faint); max-width: 85ch; }
.sub { margin: 4px 0 0; }
.caption { margin: 6px 0 12px; }
nav ul { padding-left: 20px; }
.wide { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 9px; text-align: right; white-space: nowrap; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
thead th.group { text-align: center; border-bottom: 1px solid var(--line); }
th.label, td.words, th.words { text-align: left; }
tbody th.label { font-weight: 500; max-width: 340px; white-space: normal;
  overflow-wrap: break-word; }
tbody th.long { min-width: 170px; }
td.words { white-space: normal; min-width: 240px; overflow-wrap: anywhere; }
td.edge, th.edge { padding-left: 18px; }
tbody + tbody tr:first-child > * { border-top: 1px solid var(--line); }
tbody tr:hover { background: var(--soft); }
tr.published > * { color: var(--faint); font-style: italic; font-weight: 400; }
.std { color: var(--faint); font-size: 11.5px; }
.none { color: var(--faint); }
.notes { color: var(--faint); font-size: 13.5px; padding-left: 18px; max-width: 100ch; }
figure { margin: 0 0 20px; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: 8px;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-size: 13.5px; margin-top: 6px; }
details { margin: 10px 0; border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 600; }
details > *:nth-child(2) { margin-top: 12px; }
aside { border-left: 4px solid var(--line); background: var(--soft); padding: 10px 16px;
  margin: 18px 0; border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
aside.warning { background: var(--amber); border-color: var(--amber-line); }
aside ul { margin: 4px 0 0; padding-left: 20px; }
@media print {
  :root { --ink: #000; --faint: #444; --line: #bbb; --paper: #fff; --soft: #fff; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 8pt; } th, td { padding: 2px 4px; } .std { font-size: 6.5pt; }
  .wide { overflow: visible; } nav { display: none; }
  figure, tr, aside { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
