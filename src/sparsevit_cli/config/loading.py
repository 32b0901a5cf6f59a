"""Load, dump, compare and hash experiments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel

from sparsevit_cli.errors import ConfigError

from .experiment import ExperimentConfig
from .fields import Fields, shown
from .overrides import Override, apply_overrides
from .validation import validate
from .yaml_loader import Value, dump_yaml, parse_yaml, read_yaml

DEFAULT_CONFIG = "digits.yaml"


def load_config(
    path: Path | None, overrides: Sequence[str | Override] = (), *, is_packaged: bool = True
) -> ExperimentConfig:
    """The experiment in a YAML file, changed by `section.field=value` overrides.

    None is the packaged digits, or all defaults unless `is_packaged`.

    Relative paths inside the file (data.root, model.checkpoint, output) are kept as they are and so mean
    the current directory, not the file's. Raises ConfigError.
    """
    if path is None and not is_packaged:
        return validate(apply_overrides(parse_yaml(b"{}", "defaults"), overrides))
    document = read_yaml(packaged_config_path(DEFAULT_CONFIG) if path is None else path)
    return validate(apply_overrides(document, overrides))


def read_config(text: str) -> ExperimentConfig:
    """The experiment that `dump_config` wrote. Raises ConfigError."""
    return validate(parse_yaml(text.encode(), "it"))


def packaged_config_path(name: str = DEFAULT_CONFIG) -> Path:
    """Path of an experiment shipped with the package. Raises ConfigError that lists where it was looked for."""
    package = Path(__file__).resolve().parents[1]
    # A wheel carries them inside the package; an editable install stays in the repository (src/sparsevit_cli).
    places = [package / "configs" / name, package.parents[1] / "configs" / name]
    for place in places:
        if place.is_file():
            return place
    got = f"neither {places[0]} nor {places[1]} exists"
    raise ConfigError(f"packaged configuration {name}", got, "Install the package again, or give --config.")


def dump_config(config: ExperimentConfig) -> str:
    """YAML, all settings and no comments, that loads back to an equal experiment.

    Raises ConfigError where it would not: what is saved now is compared with the settings of the next command.
    """
    text = dump_yaml(_data(config))
    try:
        is_equal = read_config(text) == config
    except ConfigError as fault:
        got = f"it could be saved but not read again ({fault.what}: {fault.got})"
        raise ConfigError("configuration", got, fault.do) from fault
    assert is_equal, "every value of the schema is read as it was written"
    return text


def config_differences(old: ExperimentConfig, new: ExperimentConfig, ignore: Collection[str] = ()) -> list[str]:
    """`section.field: old -> new` of every setting that differs, in the order of the schema.

    All of them, because callers look for those that matter to them. `ignore` names sections or fields, e.g.
    `{"output", "search.seconds"}`.
    """
    for name in ignore:
        assert any(Fields.of(type(each)).at(tuple(name.split("."))) is not None for each in (old, new)), name
    before, after = _leaves(_data(old)), _leaves(_data(new))
    return [
        f"{name}: {shown(before.get(name))} -> {shown(after.get(name))}"
        for name in dict.fromkeys((*before, *after))  # another source has other settings
        if before.get(name) != after.get(name) and not any(f"{name}.".startswith(f"{ignored}.") for ignored in ignore)
    ]


SCHEMA_VERSION = 2
"""Raised when a default changes, or what a setting means: hashes of before stand for something else."""


def section_hash(config: ExperimentConfig, *sections: str, ignore: Collection[str] = ()) -> str:
    """SHA-256 (hex) of what is set in sections or fields (`"model"`, `"data.root"`, `"seed"`), in any order.

    Settings at their default do not count, so that a new one changes no hash of before. `ignore` names fields.
    """
    defaults = _defaults(type(config))
    chosen = {
        name: _without_defaults(config, name, value)
        for name, value in settings_of(config, *sections).items()
        if name not in ignore and (name not in defaults or defaults[name] != value)
    }
    text = json.dumps({"schema": SCHEMA_VERSION, **chosen}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_defaults(config: ExperimentConfig, name: str, value: Value) -> Value:
    """`value`, the items of a list of sections (a curriculum) without their settings at their defaults."""
    found: object = config
    for step in name.split("."):
        found = getattr(found, step)
    items = found if isinstance(found, tuple) else ()
    sections = [item.model_dump(mode="json", exclude_defaults=True) for item in items if isinstance(item, BaseModel)]
    return list(sections) if sections else value


def settings_of(config: ExperimentConfig, *sections: str) -> dict[str, Value]:
    """The values of sections or fields (`"model"`, `"data.root"`, `"seed"`) by dotted name."""
    assert sections, "name the sections"
    leaves = _leaves(_data(config))
    chosen: dict[str, Value] = {}
    for section in sections:
        found = {name: leaves[name] for name in leaves if f"{name}.".startswith(f"{section}.")}
        assert found, section
        chosen.update(found)
    return chosen


def _defaults(kind: type[BaseModel], prefix: str = "") -> dict[str, Value]:
    """Dotted name -> default of every field that has one and is not a section."""
    found: dict[str, Value] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _defaults(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            found[f"{prefix}{name}"] = json.loads(json.dumps(field.get_default(call_default_factory=True)))
    return found


def _data(config: ExperimentConfig) -> dict[str, Value]:
    return config.model_dump(mode="json")


def _leaves(section: dict[str, Value], prefix: str = "") -> dict[str, Value]:
    """Dotted name -> value of every field that is not a section."""
    leaves: dict[str, Value] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves
