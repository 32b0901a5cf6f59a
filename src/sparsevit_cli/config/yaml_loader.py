"""YAML as experiments use it: plain data, read and written so that nothing surprises.

Read from the event stream of PyYAML, so there is no constructor that a tag or a name could reach. Scalars
follow YAML 1.2 (core schema): `1e-4` is a number; `no`, `on`, `12:30` and `2024-01-01` are text. Anchors,
aliases, tags, duplicate keys, several documents and oversized or deeply nested input are refused with
file:line:column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from sparsevit_cli.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_DIGITS = 20
MAX_VALUES = 10_000
"""Bounds the time and memory of whatever follows; an experiment has about 150 values."""

Value = bool | int | float | str | list["Value"] | dict[str, "Value"] | None
FieldPath = tuple[str | int, ...]
"""Keys and list positions from the top of a document down to a value."""

# libyaml reads the worst megabyte in 0.1 s where the Python parser needs 2 s; both give the same events.
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """Plain data, and where each value stands (`file:line:column`, or the override that set it)."""

    data: Value
    places: Mapping[FieldPath, str]


def read_yaml(path: Path) -> Document:
    """The one document of a YAML file of at most 1 MiB. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as fault:
        got = f"cannot be read ({getattr(fault, 'strerror', None) or fault})"
        raise ConfigError(printable(str(path)), got, "Check the path of the configuration file.") from fault
    return parse_yaml(content, printable(str(path)))


def parse_yaml(content: bytes, name: str) -> Document:
    """The one document in UTF-8 `content`; `name` stands for the file in messages. Raises ConfigError."""
    if len(content) > MAX_BYTES:
        got = f"larger than {MAX_BYTES // 1024} KiB"
        raise ConfigError(f"{name}:1:1", got, "An experiment takes a few KiB; is this the right file?")
    text = _decode(content, name)
    if unprintable := _UNPRINTABLE.search(text):
        got = f"character U+{ord(unprintable.group()):04X} is not allowed in YAML"
        raise ConfigError(_place_in_text(text, unprintable.start(), name), got, "Remove it.")
    reader = _Reader(text, name)
    try:
        return reader.document()
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        got = f"not valid YAML: {', '.join(part for part in (fault.context, fault.problem) if part)}"
        raise ConfigError(place, printable(got), "Correct it there; quote a text with special characters.") from fault
    except (yaml.YAMLError, ValueError, OverflowError) as fault:  # the Python parser lets chr() of an escape fail
        raise ConfigError(
            reader.last_place,
            printable(f"not valid YAML: {fault}"),
            "Correct it there; quote a text with special characters.",
        ) from fault


def dump_yaml(data: Value) -> str:
    """YAML text that `parse_yaml` reads back as equal data, and YAML 1.1 readers too."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
    return str(text)


def resolve_scalar(text: str) -> Value:
    """What an unquoted scalar means. Raises ValueError for numbers that are not finite or absurdly long."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= MAX_DIGITS else None
        if number is None or len(str(number)) > MAX_DIGITS:  # 0x... may be longer when written as a decimal number
            raise ValueError(f"{shorten(text)} is too long for a whole number")
        return number
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        real = float(text) if _FLOAT.fullmatch(text) else math.nan
        if not math.isfinite(real):
            raise ValueError(f"{shorten(text)} is not a finite number")
        return real
    return text


def printable(text: str) -> str:
    """The text with control, direction and other invisible characters spelled out as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, length: int = 80) -> str:
    """The start of a text, for messages."""
    return text if len(text) <= length else text[: length - 4] + " ..."


class _Reader:
    """Builds plain data from parser events, refusing what an experiment has no use for."""

    def __init__(self, text: str, name: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_PARSER)
        self._name = name
        self._places: dict[FieldPath, str] = {}
        self._num_values = 0
        self.last_place = f"{name}:1:1"

    def document(self) -> Document:
        next(self._events)  # stream start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise ConfigError(self.last_place, "empty", "Write at least one section, or {} for all defaults.")
        data = self._value(next(self._events), ())
        next(self._events)  # document end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(event, "a second document starts", "Keep one experiment per file.")
        return Document(data, self._places)

    def _value(self, event: yaml.Event, path: FieldPath) -> Value:
        self._check(event, path)
        self._places.setdefault(path, self._place(event))
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Value] = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, (*path, len(items))))
            return items
        entries: dict[str, Value] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            if key in entries:
                got = f"{printable(shorten(key))} stands here twice, first at {self._places[(*path, key)]}"
                self._refuse(event, got, "Remove one of the two.")
            self._places[(*path, key)] = self._place(event)
            entries[key] = self._value(next(self._events), (*path, key))
        return entries

    def _check(self, event: yaml.Event, path: FieldPath) -> None:
        self.last_place = self._place(event)
        self._num_values += 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, "aliases (*name) are not allowed", "Write the value out, or quote a text.")
        if getattr(event, "anchor", None) is not None:
            self._refuse(event, "anchors (&name) are not allowed", "Write the value out, or quote a text.")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, "tags (!name) are not allowed", "Write the plain value, or quote a text.")
        if len(path) > MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", "An experiment needs four.")
        if self._num_values > MAX_VALUES:
            self._refuse(event, f"more than {MAX_VALUES} values", "Is this the right file?")

    def _key(self, event: yaml.Event, path: FieldPath) -> str:
        self._check(event, path)
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, "a list or mapping stands where a name is expected", "Write `name: value`.")
        self._refuse_surrogates(event)
        return str(event.value)

    def _scalar(self, event: yaml.ScalarEvent) -> Value:
        self._refuse_surrogates(event)
        if not event.implicit[0]:
            return str(event.value)
        try:
            return resolve_scalar(event.value)
        except ValueError as fault:
            self._refuse(event, str(fault), "Write a number that a computer can hold, or quote a text.")

    def _refuse_surrogates(self, event: yaml.ScalarEvent) -> None:
        if _SURROGATE.search(event.value):
            self._refuse(event, "half of a surrogate pair is not a character", r"Write the character, or \UXXXXXXXX.")

    def _place(self, event: yaml.Event) -> str:
        assert event.start_mark is not None
        return f"{self._name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _refuse(self, event: yaml.Event, got: str, do: str) -> NoReturn:
        raise ConfigError(self._place(event), got, do)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_list(dumper: _Dumper, data: list[Value]) -> yaml.Node:
    """A list on one line, unless it holds a mapping."""
    flow = not any(isinstance(item, dict) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
# PyYAML's own patterns (YAML 1.1) stay in force; these add what only YAML 1.2 reads as a number.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{_INTEGER.pattern})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        before = content[: fault.start].decode("utf-8", "replace")
        got = f"byte 0x{content[fault.start]:02x} is not UTF-8"
        raise ConfigError(_place_in_text(before, len(before), name), got, "Write it in UTF-8.") from fault


def _place_in_text(text: str, position: int, name: str) -> str:
    return f"{name}:{text.count(chr(10), 0, position) + 1}:{position - text.rfind(chr(10), 0, position)}"
