"""Sections as one HTML page, as Markdown and as JSON; and the README's part of them."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from ..core.errors import BenchError
from ..core.strict import encode
from .report import Cell, Section, Table

TITLE = "smolvla-edge benchmarks"
BEGIN, END = "<!-- smolvla-bench table: begin -->\n", "<!-- smolvla-bench table: end -->\n"


def html(sections: Sequence[Section]) -> str:
    """One page that needs nothing else: styles and plots are in it."""
    body = []
    for section in sections:
        level = "h2" if section.command else "h3"
        body.append(f"<{level}>{escape(section.heading)}</{level}>")
        if section.command:
            body.append(f"<p>{_element('code', section.command)}</p>")
        body += [_element("p", cell) for cell in section.sentences]
        if section.plot:
            body.append(section.plot())
        if section.table:
            head, rows = section.table.head, section.table.rows
            lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
            for *first, last in rows:
                span = len(head) - len(first)
                lines.append(
                    "".join(_element("td", cell) for cell in first) + _element("td", last, span)
                )
            body.append(
                f"<div><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"
            )
    return Template(files(__package__).joinpath("page.html").read_text()).substitute(
        body="\n".join(body)
    )


def _element(tag: str, cell: Cell, span: int = 1) -> str:
    field = f' data-field="{escape(cell.field)}"' if cell.field else ""
    across = f' colspan="{span}"' if span > 1 else ""
    return f"<{tag}{field}{across}>{escape(cell.text)}</{tag}>"


def markdown(sections: Sequence[Section]) -> str:
    """The same without plots."""
    lines = []
    for section in sections:
        lines += ["", f"{'###' if section.command else '####'} {section.heading}", ""]
        if section.command:
            lines += ["    " + " ".join(section.command.text.splitlines()), ""]
        lines += [f"{cell.text}  " for cell in section.sentences]
        if section.table:
            lines += [""] * bool(section.sentences) + _aligned(section.table)
    return "".join(f"{line}\n" for line in lines[1:])


def _aligned(table: Table) -> list[str]:
    """Readable as it is, too: columns below one another, but for the last of a row, which may be a sentence."""
    rows = [list(table.head), *([_one_line(cell.text) for cell in row] for row in table.rows)]
    widths = [
        max(len(row[i]) for row in rows if len(row) > i + 1) for i in range(len(table.head) - 1)
    ]
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append(f"| {' | '.join([*padded, row[-1]])} |" + " |" * (len(table.head) - len(row)))
    dashes = "|".join("-" * (width + 2) for width in [*widths, max(len(table.head[-1]), 1)])
    return [lines[0], f"|{dashes}|", *lines[1:]]


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", "\\|")


def as_json(sections: Sequence[Section]) -> str:
    """Headings, sentences and tables, each cell with its text and its field."""
    kept = ("heading", "command", "sentences", "table")
    found = [{name: encode(getattr(section, name)) for name in kept} for section in sections]
    return json.dumps({"title": TITLE, "sections": found}, indent=1)


def into_readme(readme: str, sections: Sequence[Section], name: str) -> str:
    """`readme` with what results say in short between its two markers. Raises BenchError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise BenchError(
            f"{name} lacks the lines {BEGIN.strip()} and {END.strip()}: the table goes between them"
        )
    return (
        before
        + begin
        + markdown([section for section in sections if section.headline])
        + end
        + after
    )
