"""Tables of what commands and reports print: they fit the terminal's width, and break no word that fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 120  # characters from which on a table shows its further columns


def table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], styles: Iterable[str], width: int
) -> Table:
    """A table of at most `width` characters. columns: their headings, those that end in "#" are aligned to the right.
    rows: the cells; None among them draws a line. styles: of each row, as rich names them.

    A column is as wide as its longest line if all fit, and never narrower than its longest word as long as the words of
    all columns fit beside one another."""
    made = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headings, rows = list(columns), list(rows)
    cells = [[h.removesuffix("#"), *(row[i] for row in rows)] for i, h in enumerate(headings)]
    for heading, size in zip(headings, _widths(cells, width - 2 * (len(headings) - 1))):
        justify = "right" if heading.endswith("#") else "left"
        made.add_column(heading.removesuffix("#"), justify=justify, width=size, overflow="fold")
    for row, style in zip(rows, styles):
        made.add_row(*map(Text, row), style=style)
    return made


def _widths(columns: list[list[str]], room: int) -> list[int]:
    """Each column's, of `room` characters together."""
    longest = [max((len(line) for cell in column for line in cell.split("\n")), default=0) for column in columns]
    widths = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    while sum(widths) < room and widths != longest:  # the narrowest of those that want more first
        i = min((i for i, (a, b) in enumerate(zip(widths, longest)) if a < b), key=lambda i: widths[i])
        widths[i] += 1
    while sum(widths) > room:  # words must be broken after all
        widths[widths.index(max(widths))] -= 1
    return widths


def as_text(shown: object, width: int) -> str:
    """What `shown` prints on a console of `width` characters, without colours."""
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()
