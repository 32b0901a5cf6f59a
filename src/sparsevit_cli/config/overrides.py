"""`section.field=value` on the command line: one value of the experiment replaced before validation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NoReturn

from sparsevit_cli.errors import ConfigError

from .fields import dotted, field_schema, is_section, nearest, shown
from .yaml_loader import Document, Value, parse_yaml, printable, shorten

_EXAMPLES = "Write section.field=value, e.g. search.population=32 or finetune.ratios=[[0.6],[0]]."


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """A new document with each override applied in order; sections that are not written yet are made.

    The value is read by the same rules as the file; the last of two overrides of one field wins. Whether
    the value is allowed is left to validation. Raises ConfigError.
    """
    if not isinstance(document.data, dict):
        return document  # no sections at all: validation says so
    data, places = copy.deepcopy(document.data), dict(document.places)
    for override in overrides:
        path, value = parse_override(override)
        section = data
        for depth, name in enumerate(path[:-1], start=1):
            inner = section.setdefault(name, {})
            if not isinstance(inner, dict):
                got = f"{shown(inner)} ({places[path[:depth]]}) is not a section, and {_origin(override)} needs one"
                raise ConfigError(dotted(path[:depth]), got, "Correct the file.")
            section = inner
        section[path[-1]] = value
        places = {place: at for place, at in places.items() if place[: len(path)] != path}
        places[path] = _origin(override)
    return Document(data, places)


def parse_override(override: str) -> tuple[tuple[str, ...], Value]:
    """Field path and value of `section.field=value`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals:
        _refuse(override, "no = in it", _EXAMPLES)
    if not all(path):
        _refuse(override, "no field name before =" if not key.strip() else "an empty name between dots", _EXAMPLES)
    if not text.strip():
        _refuse(override, "no value after =", "Write null for none and '' for empty text.")
    _require_field(path, override)
    try:
        value = parse_yaml(text.encode("utf-8", "surrogateescape"), "value").data
    except ConfigError as fault:
        raise ConfigError(dotted(path), f"{fault.got} ({_origin(override)})", fault.do) from fault
    return path, value


def _require_field(path: tuple[str, ...], override: str) -> None:
    """Raise ConfigError where `path` does not lead through sections to a field."""
    origin = f"({_origin(override)})"
    for depth in range(len(path)):
        above = field_schema(path[:depth])
        assert above is not None, path
        if not is_section(above):
            got = f"{dotted(path[:depth])} is not a section {origin}"
            raise ConfigError(dotted(path), got, f"Set {dotted(path[:depth])} as a whole.")
        if field_schema(path[: depth + 1]) is None:
            raise ConfigError(dotted(path), f"unknown setting {origin}", nearest(path[: depth + 1]))
    if is_section(field_schema(path) or {}):
        raise ConfigError(dotted(path), f"a section, not a field {origin}", "Set its fields one by one.")


def _origin(override: str) -> str:
    return f"--set {shorten(printable(override))}"


def _refuse(override: str, got: str, do: str) -> NoReturn:
    raise ConfigError(_origin(override), got, do)
