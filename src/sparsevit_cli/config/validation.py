"""From a document to an experiment: every fault told by its field path, value, place and what is allowed."""

from __future__ import annotations

import json

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sparsevit_cli.errors import ConfigError

from .experiment import ExperimentConfig
from .fields import Fields, JsonSchema, dotted, nearest_choice, shown
from .tasks import fields_by_source, own_value, type_of
from .yaml_loader import Document, FieldPath, Value, printable, resolve_scalar, shorten

MAX_TOLD = 10


def validate(document: Document) -> ExperimentConfig:
    """The experiment a document describes. Raises ConfigError that tells up to ten faults."""
    if not isinstance(document.data, dict):
        got = f"{shown(document.data)} instead of sections"
        raise ConfigError(document.places[()], got, "Write `section:` and the indented `field: value` below it.")
    kind = type_of(document)
    fields = Fields.of(kind)
    try:
        # JSON mode, because a strict schema takes lists for tuples only there.
        return kind.model_validate_json(json.dumps(document.data))
    except ValidationError as errors:
        by_path = _errors_by_path(errors.errors(include_url=False), document, fields)
    first, *others = (_fault(path, by_path[path], document, fields) for path in list(by_path)[:MAX_TOLD])
    more = [f"and {len(by_path) - MAX_TOLD} more"] if len(by_path) > MAX_TOLD else []
    first.others = (*map(str, others), *more)
    raise first


def _errors_by_path(
    errors: list[ErrorDetails], document: Document, fields: Fields
) -> dict[FieldPath, list[ErrorDetails]]:
    """The errors of each path, in the order of the file; each choice of a union reports its own."""
    by_path: dict[FieldPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_field_path(error["loc"], fields), []).append(error)
    written = {path: number for number, path in enumerate(document.places)}
    ordered = sorted(by_path, key=lambda path: written[_written(path, document)])
    return {path: by_path[path] for path in ordered}


def _fault(path: FieldPath, errors: list[ErrorDetails], document: Document, fields: Fields) -> ConfigError:
    what, place = dotted(path), _place(path, document)
    if errors[0]["type"] == "extra_forbidden":
        assert isinstance(document.data, dict)
        others = fields_by_source(own_value(document.data, "task", "name"))
        got = f"unknown setting, with the value {shown(_value(path, document))}{place}"
        return ConfigError(what, got, fields.nearest(path, others))
    schema = fields.at(path)
    assert schema is not None, path
    if errors[0]["type"] == "missing":
        return ConfigError(
            what, f"missing{place}; allowed: {fields.allowed(schema)}", f"Give it. {_meaning(schema)}".rstrip()
        )
    for error in errors:
        if error["type"] == "value_error":
            cause = error["ctx"]["error"]
            message, do = str(cause), "Change one of them."
            if isinstance(cause, ConfigError):
                message, do = f"{cause.what}: {cause.got}".removeprefix(": "), cause.do
            return ConfigError(what, f"{shorten(printable(message), 200)}{place}", shorten(do, 200))
    value = _value(path, document)
    return ConfigError(
        what, f"{shown(value)} is not allowed{place}; allowed: {fields.allowed(schema)}", _advice(value, schema, fields)
    )


def _advice(value: Value, schema: JsonSchema, fields: Fields) -> str:
    kind = fields.resolved(schema).get("type")
    if value is None and kind == "object":
        return "Put a setting below it, or remove the line."
    if isinstance(value, str) and kind in ("integer", "number", "boolean") and _is_quoted(value):
        return "Write it without quotes."
    if isinstance(value, str) and kind == "boolean" and value.lower() in ("yes", "no", "on", "off"):
        return f"Write {'true' if value.lower() in ('yes', 'on') else 'false'}."
    if (meant := _meant(value, fields.resolved(schema), fields)) is not None:
        return f"Did you mean {meant}?"
    return f"Change it. {_meaning(schema)}".rstrip()


def _meant(value: Value, schema: JsonSchema, fields: Fields) -> str | None:
    """The choice that a wrong text, or one in a list, may have meant."""
    choices = fields.resolved(schema.get("items", schema)).get("enum", ())
    wrong = [each for each in (value if isinstance(value, list) else [value]) if each not in choices]
    return nearest_choice(wrong[0], choices) if wrong else None


def _is_quoted(value: str) -> bool:
    try:
        return not isinstance(resolve_scalar(value), str)
    except ValueError:
        return False


def _meaning(schema: JsonSchema) -> str:
    description = schema.get("description", "")
    return f"Meaning: {description}" if description else ""


def _field_path(loc: tuple[str | int, ...], fields: Fields) -> FieldPath:
    """The path of an error without the union members that pydantic appends; an unknown key ends it."""
    path: FieldPath = ()
    schema: JsonSchema | None = fields.schema
    for step in loc:
        if schema is None or "anyOf" in fields.resolved(schema):
            break
        path, schema = (*path, step), fields.child(schema, step)
    return path


def _value(path: FieldPath, document: Document) -> Value:
    value = document.data
    for step in path:
        if isinstance(value, dict):
            value = value[str(step)]
        elif isinstance(value, list):
            value = value[int(step)]
    return value


def _place(path: FieldPath, document: Document) -> str:
    """` (file:line:column)` of the value or of the section above it; nothing where neither is written."""
    path = _written(path, document)
    return f" ({document.places[path]})" if path else ""


def _written(path: FieldPath, document: Document) -> FieldPath:
    """The path itself, or the nearest one above it that the document writes."""
    while path and path not in document.places:
        path = path[:-1]
    return path
