"""What is wrong with a TOML file, in words; loaded only when something is."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

import msgspec


def explained(said: str, kind: Any, table: Any = None) -> str:
    """What msgspec said of ``table`` for struct ``kind``; of an unknown key also its section and what was meant."""
    choice = re.fullmatch(r"Invalid enum value (.*?)(?: - at `\$\.(.*)`)?", said, re.DOTALL)
    if choice is not None:
        return _wrong_choice(choice[1], choice[2] or "", kind)
    missing = re.fullmatch(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", said, re.DOTALL)
    if missing is not None:
        return f"the key {missing[1]!r} is missing" + (f" in {_heading(missing[2])}" if missing[2] else "")
    whole = re.fullmatch(r"Expected `object`, got `(.*?)`", said)
    if whole is not None:
        return f'is {_TYPES.get(whole[1], whole[1])}, but must be an object with keys, as {{"name": ...}}'
    wrong = re.fullmatch(r"Expected `(.*?)`(.*?)(?:, got `(.*?)`)?(?: - at `\$\.?(.*)`)?", said, re.DOTALL)
    if wrong is not None:
        return _wrong_value(wrong[1], wrong[2], wrong[3], _full_place(wrong[4] or "", kind, table) or "it")
    unknown = re.fullmatch(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?", said, re.DOTALL)
    return said if unknown is None else _unknown_key(unknown[1], unknown[2] or "", kind)


def _unknown_key(key: str, place: str, kind: Any) -> str:
    """Where it stands, and what was meant."""
    section, sections = kind, re.findall(r"\.(\w+)", place)
    for name in sections:
        section = _tables(section).get(name, (None, ""))[0]
    where = f" in [{'.'.join(sections)}]" if sections else ""
    number = re.search(r"\[(\d+)\]$", place)
    if number:
        where = f" in table {int(number[1]) + 1} of [[{'.'.join(sections)}]]"
    known = _keys(section)
    close = get_close_matches(key, known, 1)
    if close:
        return f"unknown key {key!r}{where}; did you mean {close[0]!r}?"
    for other, heading in _tables(kind).values():
        if key in _keys(other):
            if sections and len(known) == 1:
                return f"unknown key {key!r}{where}; did you mean {known[0]!r}? ({key!r} belongs in {heading})"
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


def _wrong_choice(got: str, place: str, kind: Any) -> str:
    """What may stand where a word stands that is none of those allowed."""
    allowed = [part for part in _parts(_type_at(place, kind)) if get_origin(part) is Literal]
    words = [repr(value) for part in allowed for value in get_args(part)]
    words += ["true or false"] if bool in _parts(_type_at(place, kind)) else []
    return f"{place or 'it'} is {got}, but must be {' or '.join(words) or 'another value'}"


def _heading(place: str) -> str:
    """A place as TOML heads it: ``[link]``, or ``table 2 of [[data]]``."""
    number = re.fullmatch(r"(.*)\[(\d+)\]", place)
    return f"[{place}]" if number is None else f"table {int(number[2]) + 1} of [[{number[1]}]]"


def _full_place(place: str, kind: Any, table: Any) -> str:
    """The place with the key of a table of any keys, which msgspec leaves out: the first whose value is wrong."""
    if not place.endswith("[...]") or table is None:
        return place
    outer = place.removesuffix("[...]")
    values = [part for part in _parts(_type_at(outer, kind)) if get_origin(part) is dict]
    for name in re.findall(r"\w+", outer):
        table = table.get(name) if isinstance(table, dict) else None
    for key, value in table.items() if isinstance(table, dict) and values else ():
        try:
            msgspec.convert(value, get_args(values[0])[1])
        except msgspec.ValidationError:
            return f"{outer}.{key}"
    return outer


def _type_at(place: str, kind: Any) -> Any:
    """The type of a key, such as ``link.metered``, in a struct; None if it is not to be found."""
    for name in re.findall(r"[A-Za-z_]\w*", place):
        structs = [part for part in _parts(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct)]
        fields = [field for struct in structs for field in msgspec.structs.fields(struct)]
        kind = next((field.type for field in fields if field.encode_name == name), None)
    return kind


def _parts(kind: Any) -> list[Any]:
    """A type and those in it: of a union, an optional, an annotated one, a list."""
    if get_origin(kind) in (Literal, dict):
        return [kind]
    return [kind, *(found for part in get_args(kind) for found in _parts(part))]


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
