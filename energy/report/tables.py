"""Tables that stand in the page, in CSV and in JSON alike. Columns that hold a number have its unit in their name."""

from __future__ import annotations

import csv
import io
import math
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from energy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_DASH = "\u2013"
_LONG = 36  # characters of a text that needs a wide column
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run


class Column(NamedTuple):
    """``key`` names it in files; ``heading`` and ``show`` make it readable in the page.

    ``in_page`` and ``in_files`` say where it stands: what is several columns for programs may be one for people.
    """

    key: str
    heading: str
    show: Callable[[Any], str] = str
    in_page: bool = True
    number: bool = True
    in_files: bool = True


class Table(NamedTuple):
    """``key`` names its file; every row has a value (None: unknown) for each column."""

    key: str
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        """The rows as objects, as files have them."""
        kept = self._in_files()
        return [{column.key: rounded(row[index]) for index, column in kept} for row in self.rows]

    def lines(self) -> list[list[Any]]:
        """Names and values of the columns, as files have them."""
        kept = self._in_files()
        return [[column.key for _, column in kept], *([rounded(row[index]) for index, _ in kept] for row in self.rows)]

    def _in_files(self) -> list[tuple[int, Column]]:
        return [(index, column) for index, column in enumerate(self.columns) if column.in_files]

    def column(self, key: str) -> list[Any]:
        """All values of one column."""
        index = [column.key for column in self.columns].index(key)
        return [row[index] for row in self.rows]


def rounded(value: Any) -> Any:
    """A float with six significant digits, all of those before the point kept; anything else as it is."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return value
    return round(value, max(0, 5 - math.floor(math.log10(abs(value)))))


def text_column(key: str, heading: str, *, in_page: bool = True) -> Column:
    """A column of words."""
    return Column(key, heading, str, in_page, number=False)


def page_column(key: str, heading: str) -> Column:
    """A column of words for the page only."""
    return Column(key, heading, number=True, in_files=False)


def html_table(table: Table, *, cards: bool = False, empty: str = "There are none.") -> str:
    """The table in HTML; columns in which nothing is known are left out. ``cards``: on a phone one card per row."""
    if not table.rows:
        return f"<p>{escape(empty)}</p>"
    shown = [
        (index, column)
        for index, column in enumerate(table.columns)
        if column.in_page and any(row[index] not in (None, "") for row in table.rows)
    ]
    head = "".join(f"<th{_css(column)}>{escape(column.heading)}</th>" for _, column in shown)
    body = "".join(f"<tr>{''.join(_cell(column, row[index]) for index, column in shown)}</tr>" for row in table.rows)
    css = ' class="cards"' if cards else ""
    return f'<div class="scroll"><table{css}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def csv_text(table: Table) -> str:
    """The table as CSV (RFC 4180); an unknown value is an empty cell."""
    out = io.StringIO(newline="")
    csv.writer(out).writerows([_csv_value(value) for value in line] for line in table.lines())
    return out.getvalue()


def write_csv(tables: Iterable[Table], folder: Path) -> list[Path]:
    """One file per table.

    Raises:
        UsageError: the folder cannot be written.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table in tables:
            path = folder / f"{table.key}.csv"
            path.write_text(csv_text(table), encoding="utf-8", newline="")
            paths.append(path)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); choose another --csv folder") from error
    return paths


def _cell(column: Column, value: Any) -> str:
    unknown = value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))
    words = _DASH if unknown else column.show(value)
    css = ' class="long"' if not column.number and len(words) > _LONG else _css(column)
    return f'<td{css} data-label="{escape(column.heading)}"><span>{escape(words)}</span></td>'


def _css(column: Column) -> str:
    return ' class="number"' if column.number else ""


def _csv_value(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value
