"""A schema in plain words: what a field path allows, and which known one an unknown key may have meant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from .yaml_loader import FieldPath, printable, shorten

JsonSchema = dict[str, Any]


@dataclass(frozen=True)
class Fields:
    """The fields of one type of experiment, by their paths."""

    schema: JsonSchema
    """JSON schema of the whole experiment."""

    @staticmethod
    @lru_cache(maxsize=64)
    def of(kind: type[BaseModel]) -> Fields:
        """Those of a pydantic model."""
        return Fields(kind.model_json_schema())

    def resolved(self, schema: JsonSchema) -> JsonSchema:
        """The schema behind a reference, and behind `... or null`; keeps description and default."""
        if "$ref" in schema:
            target: JsonSchema = self.schema["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
            return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
        choices = [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]
        if len(choices) == 1:
            return {**self.resolved(choices[0]), **{key: value for key, value in schema.items() if key != "anyOf"}}
        return schema

    def child(self, schema: JsonSchema, step: str | int) -> JsonSchema | None:
        """Schema of one key or list position; None if the schema does not name it."""
        schema = self.resolved(schema)
        if isinstance(step, str):
            child = schema.get("properties", {}).get(step)
        else:
            fixed = schema.get("prefixItems", [])
            child = fixed[step] if step < len(fixed) else schema.get("items")
        return child if isinstance(child, dict) else None

    def at(self, path: FieldPath) -> JsonSchema | None:
        """Schema of the field at `path`, None if there is none."""
        schema: JsonSchema | None = self.schema
        for step in path:
            if schema is None:
                return None
            schema = self.child(schema, step)
        return schema

    def is_section(self, schema: JsonSchema) -> bool:
        """True for a mapping of named fields."""
        return "properties" in self.resolved(schema)

    def allowed(self, schema: JsonSchema) -> str:
        """Type and range of a field in plain words: `whole number of at least 1, or null`."""
        if "anyOf" in schema:
            words = [self.allowed(choice) for choice in schema["anyOf"]]
            return ", or ".join(words)
        return self._words(schema, plural=False)

    def nearest(self, path: FieldPath, others: Mapping[str, Fields] | None = None) -> str:
        """What to do about the unknown last key of `path`: the nearest known setting, or the list of them.

        `others` are the fields of experiments with other data sources, by the name of the source.
        """
        elsewhere = [source for source, fields in (others or {}).items() if fields.at(path) is not None]
        if elsewhere:
            return f"Remove it, or set data.source: it is a setting of {' and '.join(elsewhere)}."
        section, key = path[:-1], _normal(str(path[-1]))
        names = list(self.resolved(self.at(section) or {}).get("properties", {}))
        ranked = sorted(names, key=lambda name: -_likeness(key, name))
        if ranked and _likeness(key, ranked[0]) >= 0.6:
            return f"Did you mean {dotted((*section, ranked[0]))}?"
        found = [field for field in self._all(self.schema, ()) if _likeness(key, str(field[-1])) >= 0.8]
        if found:
            return f"Did you mean {' or '.join(dotted(field) for field in found[:4])}?"
        return f"Known here: {', '.join(names)}." if names else "Remove it."

    def _words(self, schema: JsonSchema, *, plural: bool) -> str:
        schema = self.resolved(schema)
        s = "s" if plural else ""
        if "anyOf" in schema:
            return ", or ".join(self._words(choice, plural=plural) for choice in schema["anyOf"])
        if "const" in schema:
            return f"`{schema['const']}`"
        if "enum" in schema:
            return one_of(schema["enum"])
        if schema["type"] == "array":
            fixed = schema.get("prefixItems", [])
            least = "" if fixed or not schema.get("minItems") else "non-empty "
            size = f"{len(fixed)} " if fixed else ""
            return f"{least}list{s} of {size}{self._words(fixed[0] if fixed else schema['items'], plural=True)}"
        nouns = {
            "boolean": "`true` or `false`",
            "integer": f"whole number{s}",
            "number": f"number{s}",
            "string": f"text{s} of a fixed form" if "pattern" in schema else f"text{s}",
            "object": f"section{s} of settings",
            "null": "null",
        }
        return f"{'non-empty ' if schema.get('minLength') else ''}{nouns[schema['type']]}{_range(schema)}"

    def _all(self, schema: JsonSchema, path: FieldPath) -> list[FieldPath]:
        fields: list[FieldPath] = []
        for name, child in self.resolved(schema).get("properties", {}).items():
            fields.append((*path, name))
            fields += self._all(child, (*path, name))
        return fields


def dotted(path: FieldPath) -> str:
    """`("train", "curriculum", 0, "epochs")` as `train.curriculum[0].epochs`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{shorten(printable(step))}" for step in path)
    return text.removeprefix(".") or "configuration"


def shown(value: object) -> str:
    """A value as it would be written, short and printable."""
    return shorten(printable(json.dumps(value, ensure_ascii=False, default=str)))


def one_of(choices: Sequence[object]) -> str:
    """`a`, `b` or `c`."""
    *most, last = (f"`{choice}`" for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last


def nearest_choice(value: object, choices: Sequence[object]) -> str | None:
    """The one of `choices` that a wrong text may have meant."""
    names = [choice for choice in choices if isinstance(choice, str)]
    if not isinstance(value, str) or not names:
        return None
    likely = max(names, key=lambda name: _likeness(_normal(value), name))
    return likely if _likeness(_normal(value), likely) >= 0.6 else None


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


def _normal(key: str) -> str:
    return key[:64].lower().replace("-", "_").strip()


def _likeness(key: str, name: str) -> float:
    def ratio(one: str, other: str) -> float:
        return SequenceMatcher(None, one, other).ratio()

    sorted_key, sorted_name = ("_".join(sorted(text.split("_"))) for text in (key, name))
    return max(ratio(key, name), ratio(sorted_key, sorted_name))
