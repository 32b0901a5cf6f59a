"""`section.field=value` on the command line: one value of the experiment replaced before validation."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from sparsevit_cli.errors import ConfigError

from .fields import Fields, dotted, shown
from .tasks import fields_by_source, own_value, type_of
from .yaml_loader import Document, FieldPath, Value, parse_yaml, printable, shorten

_EXAMPLES = "Write section.field=value, e.g. search.population=32 or finetune.ratios=[[0.6],[0]]."


@dataclass(frozen=True)
class Override:
    """One value of the experiment, and how it was typed: `--set a.b=1` or `--seed 1`."""

    path: tuple[str, ...]
    value: Value
    origin: str

    @classmethod
    def typed(cls, text: str) -> Override:
        """That of `--set section.field=value`; the value is read as in a file. Raises ConfigError."""
        origin = f"--set {shorten(printable(text))}"
        key, equals, written = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals:
            _refuse(origin, "no = in it", _EXAMPLES)
        if not all(path):
            _refuse(origin, "no field name before =" if not key.strip() else "an empty name between dots", _EXAMPLES)
        if not written.strip():
            _refuse(origin, "no value after =", "Write null for none and '' for empty text.")
        try:
            value = parse_yaml(written.encode("utf-8", "surrogateescape"), "value").data
        except ConfigError as fault:
            raise ConfigError(dotted(path), f"{fault.got} ({origin})", fault.do) from fault
        return cls(path, value, origin)

    @classmethod
    def flag(cls, name: str, field: str, value: str | int | list[str]) -> Override:
        """That of a flag of its own, such as `--seed`, for the field at `field` (dotted)."""
        told = ",".join(value) if isinstance(value, list) else str(value)
        origin = f"{name} {shorten(printable(told))}"
        return cls(tuple(field.split(".")), json.loads(json.dumps(value)), origin)


def apply_overrides(document: Document, overrides: Sequence[str | Override]) -> Document:
    """A new document with each override applied in order; sections that are not written yet are made.

    The last of two overrides of one field wins. Whether the value is allowed is left to validation. Raises ConfigError.
    """
    if not isinstance(document.data, dict):
        return document  # no sections at all: validation says so
    data, places = copy.deepcopy(document.data), dict(document.places)
    typed = [Override.typed(each) if isinstance(each, str) else each for each in overrides]
    for override in typed:
        path = override.path
        section = data
        for depth, name in enumerate(path[:-1], start=1):
            inner = section.setdefault(name, {})
            if not isinstance(inner, dict):
                if Fields.of(type_of(document)).at(path) is None:  # no setting at all: said below
                    break
                got = f"{shown(inner)} ({places[path[:depth]]}) is not a section, and {override.origin} needs one"
                raise ConfigError(dotted(path[:depth]), got, "Correct the file.")
            section = inner
        else:
            section[path[-1]] = override.value
            places = {place: at for place, at in places.items() if place[: len(path)] != path}
            places[path] = override.origin
    changed = Document(data, places)
    fields = Fields.of(type_of(changed))  # only now is it known what the experiment is about
    for override in typed:
        _require_field(override, fields, own_value(data, "task", "name"))
    return changed


def _require_field(override: Override, fields: Fields, task: str | None) -> None:
    """Raise ConfigError if the path does not lead through sections to a field."""
    path: FieldPath = override.path
    origin = f"({override.origin})"
    for depth in range(len(path)):
        above = fields.at(path[:depth])
        assert above is not None, path
        if not fields.is_section(above):
            got = f"{dotted(path[:depth])} is not a section {origin}"
            raise ConfigError(dotted(path), got, f"Set {dotted(path[:depth])} as a whole.")
        if fields.at(path[: depth + 1]) is None:
            do = fields.nearest(path[: depth + 1], fields_by_source(task))
            raise ConfigError(dotted(path), f"unknown setting {origin}", do)
    if fields.is_section(fields.at(path) or {}):
        raise ConfigError(dotted(path), f"a section, not a field {origin}", "Set its fields one by one.")


def _refuse(what: str, got: str, do: str) -> NoReturn:
    raise ConfigError(what, got, do)
