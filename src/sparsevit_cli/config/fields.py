"""The schema in plain words: what a field path allows, and which known one an unknown key may have meant."""

from __future__ import annotations

import functools
import json
from difflib import SequenceMatcher
from typing import Any

from .schema import ExperimentConfig
from .yaml_loader import FieldPath, printable, shorten

JsonSchema = dict[str, Any]


@functools.cache
def experiment_schema() -> JsonSchema:
    """JSON schema of the whole experiment."""
    return ExperimentConfig.model_json_schema()


def resolved(schema: JsonSchema) -> JsonSchema:
    """The schema behind a reference, and behind `... or null`; keeps description and default."""
    if "$ref" in schema:
        target: JsonSchema = experiment_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) == 1:
        return {**resolved(choices[0]), **{key: value for key, value in schema.items() if key != "anyOf"}}
    return schema


def child_schema(schema: JsonSchema, step: str | int) -> JsonSchema | None:
    """Schema of one key or list position; None where the schema does not name it."""
    schema = resolved(schema)
    if isinstance(step, str):
        child = schema.get("properties", {}).get(step)
    else:
        fixed = schema.get("prefixItems", [])
        child = fixed[step] if step < len(fixed) else schema.get("items")
    return child if isinstance(child, dict) else None


def field_schema(path: FieldPath) -> JsonSchema | None:
    """Schema of the field at `path`, None where there is none."""
    schema: JsonSchema | None = experiment_schema()
    for step in path:
        if schema is None:
            return None
        schema = child_schema(schema, step)
    return schema


def is_section(schema: JsonSchema) -> bool:
    """True for a mapping of named fields."""
    return "properties" in resolved(schema)


def dotted(path: FieldPath) -> str:
    """`("train", "curriculum", 0, "epochs")` as `train.curriculum[0].epochs`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{shorten(printable(step))}" for step in path)
    return text.removeprefix(".") or "configuration"


def shown(value: object) -> str:
    """A value as it would be written, short and printable."""
    return shorten(printable(json.dumps(value, ensure_ascii=False, default=str)))


def allowed(schema: JsonSchema) -> str:
    """Type and range of a field in plain words: `whole number of at least 1, or null`."""
    if "anyOf" in schema:
        words = [allowed(choice) for choice in schema["anyOf"]]
        return ", or ".join(words)
    return _words(schema, plural=False)


def nearest(path: FieldPath) -> str:
    """What to do about the unknown last key of `path`: the nearest known setting, or the list of them."""
    section, key = path[:-1], _normal(str(path[-1]))
    names = list(resolved(field_schema(section) or {}).get("properties", {}))
    ranked = sorted(names, key=lambda name: -_likeness(key, name))
    if ranked and _likeness(key, ranked[0]) >= 0.6:
        return f"Did you mean {dotted((*section, ranked[0]))}?"
    elsewhere = [field for field in _all_fields(experiment_schema(), ()) if _likeness(key, str(field[-1])) >= 0.8]
    if elsewhere:
        return f"Did you mean {' or '.join(dotted(field) for field in elsewhere[:4])}?"
    return f"Known here: {', '.join(names)}." if names else "Remove it."


def _words(schema: JsonSchema, *, plural: bool) -> str:
    schema = resolved(schema)
    s = "s" if plural else ""
    if "anyOf" in schema:
        return ", or ".join(_words(choice, plural=plural) for choice in schema["anyOf"])
    if "enum" in schema:
        *most, last = (f"`{choice}`" for choice in schema["enum"])
        return f"{', '.join(most)} or {last}" if most else last
    if schema["type"] == "array":
        fixed = schema.get("prefixItems", [])
        least = "" if fixed or not schema.get("minItems") else "non-empty "
        size = f"{len(fixed)} " if fixed else ""
        return f"{least}list{s} of {size}{_words(fixed[0] if fixed else schema['items'], plural=True)}"
    nouns = {
        "boolean": "`true` or `false`",
        "integer": f"whole number{s}",
        "number": f"number{s}",
        "string": f"text{s} of a fixed form" if "pattern" in schema else f"text{s}",
        "object": f"section{s} of settings",
        "null": "null",
    }
    return f"{'non-empty ' if schema.get('minLength') else ''}{nouns[schema['type']]}{_range(schema)}"


def _range(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        words = f" from {low} to {high}"
    else:
        limits = {"of at least": low, "above": above, "of at most": high, "below": below}
        words = "".join(f" and {word} {limit}" for word, limit in limits.items() if limit is not None)
    step = f" in steps of {schema['multipleOf']}" if "multipleOf" in schema else ""
    return words.removeprefix(" and") + step


def _all_fields(schema: JsonSchema, path: FieldPath) -> list[FieldPath]:
    fields: list[FieldPath] = []
    for name, child in resolved(schema).get("properties", {}).items():
        fields.append((*path, name))
        fields += _all_fields(child, (*path, name))
    return fields


def _normal(key: str) -> str:
    return key[:64].lower().replace("-", "_").strip()


def _likeness(key: str, name: str) -> float:
    def ratio(one: str, other: str) -> float:
        return SequenceMatcher(None, one, other).ratio()

    sorted_key, sorted_name = ("_".join(sorted(text.split("_"))) for text in (key, name))
    return max(ratio(key, name), ratio(sorted_key, sorted_name))
