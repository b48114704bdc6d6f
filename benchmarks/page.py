"""Sections as one HTML page, as Markdown, on the terminal, and as JSON."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from io import StringIO
from string import Template

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..core.strict import encode
from .report import Cell, Section, Table

WIDE = 100_000  # columns: Markdown lines are not wrapped


def html(sections: Sequence[Section]) -> str:
    """One page that loads nothing: it holds its styles and its plots."""
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
            body.append(_html_table(section.table))
    page = Template(files(__package__).joinpath("page.html").read_text())
    return page.substitute(body="\n".join(body))


def _html_table(table: Table) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in table.head)]
    for *first, last in table.rows:
        cells = [_element("td", cell) for cell in first]
        lines.append("".join(cells) + _element("td", last, len(table.head) - len(first)))
    return f"<div><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _element(tag: str, cell: Cell, span: int = 1) -> str:
    field = f' data-field="{escape(cell.field)}"' if cell.field else ""
    across = f' colspan="{span}"' if span > 1 else ""
    return f"<{tag}{field}{across}>{escape(cell.text)}</{tag}>"


def markdown(sections: Sequence[Section]) -> str:
    """Headings, sentences and tables, without the plots."""
    text = StringIO()
    _print(sections, Console(file=text, width=WIDE), box.MARKDOWN)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def show(sections: Sequence[Section]) -> None:
    """The same on the terminal."""
    _print(sections, Console(), box.SIMPLE_HEAD)


def _print(sections: Sequence[Section], console: Console, lines: box.Box) -> None:
    for section in sections:
        mark = "##" if section.command else "###"
        console.print(Text(f"\n{mark} {section.heading}\n", "bold"))
        if section.command:
            console.print(Text(f"    {_one_line(section.command)}\n"))
        for cell in section.sentences:
            console.print(Text(f"{_one_line(cell)}\n"))
        if section.table:
            table = RichTable(box=lines)
            for name in section.table.head:
                table.add_column(Text(name), overflow="fold")
            for row in section.table.rows:
                table.add_row(*(Text(_one_line(cell).replace("|", "\\|")) for cell in row))
            console.print(table)


def _one_line(cell: Cell) -> str:
    return " ".join(cell.text.splitlines())


def as_json(sections: Sequence[Section]) -> str:
    """Headings, sentences and tables; each cell with its text and its field."""
    kept = ("heading", "command", "sentences", "table")
    found = [{name: encode(getattr(section, name)) for name in kept} for section in sections]
    return json.dumps({"sections": found}, indent=1)
