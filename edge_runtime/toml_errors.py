"""What is wrong with a TOML file, in words; loaded only when something is."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import msgspec


def explained(said: str, kind: Any) -> str:
    """What msgspec said of a table for struct ``kind``; of an unknown key also its section and what was meant."""
    wrong = re.fullmatch(r"Expected `(.*?)`(.*?)(?:, got `(.*?)`)? - at `\$\.(.*)`", said, re.DOTALL)
    if wrong is not None:
        return _wrong_value(*wrong.groups())
    found = re.fullmatch(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?", said, re.DOTALL)
    if found is None:
        return said
    key, place = found[1], found[2] or ""
    table, sections = kind, re.findall(r"\.(\w+)", place)
    for name in sections:
        table = _tables(table).get(name, (None, ""))[0]
    where = f" in [{'.'.join(sections)}]" if sections else ""
    number = re.search(r"\[(\d+)\]$", place)
    if number:
        where = f" in table {int(number[1]) + 1} of [[{'.'.join(sections)}]]"
    known = _keys(table)
    close = get_close_matches(key, known, 1)
    if close:
        return f"unknown key {key!r}{where}; did you mean {close[0]!r}?"
    for other, heading in _tables(kind).values():
        if key in _keys(other):
            return f"unknown key {key!r}{where}; it belongs in {heading}"
    return f"unknown key {key!r}{where}; known are {', '.join(known)}"


_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "str": "text in quotes",
    "bool": "true or false",
    "object": "a table",
    "array": "a list",
}


def _wrong_value(expected: str, limits: str, got: str | None, place: str) -> str:
    """What should stand at ``place``, for people who know TOML and not the schema."""
    names = [_TYPES.get(part, part) for part in expected.split(" | ") if part != "null"]
    text = " or ".join(dict.fromkeys(names)) + limits
    if "[A-Za-z0-9_.-]" in limits:
        text = "1 to 64 letters, digits, '_', '.' or '-', the first no sign"
    if got is None:
        return f"{place} must be {text}"
    cure = ""
    if got == "str" and "object" in expected:
        cure = f"; write its keys below [{place}]"
    elif got == "str" and "str" not in expected:
        cure = "; write it without quotes"
    return f"{place} is {_TYPES.get(got, got)}, but must be {text}{cure}"


def _keys(kind: Any) -> list[str]:
    return [] if kind is None else [field.encode_name for field in msgspec.structs.fields(kind)]


def _tables(kind: Any) -> dict[str, tuple[Any, str]]:
    """The fields of a struct that are structs, or lists of them: their types, and how TOML heads them."""
    found = {}
    for field in () if kind is None else msgspec.structs.fields(kind):
        heading = f"[[{field.encode_name}]]" if get_origin(field.type) is list else f"[{field.encode_name}]"
        for part in (field.type, *get_args(field.type)):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                found[field.encode_name] = (part, heading)
    return found
