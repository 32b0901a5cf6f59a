"""Load, dump, compare and hash experiments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from sparsevit_cli.errors import ConfigError

from .fields import field_schema, shown
from .overrides import apply_overrides
from .schema import ExperimentConfig
from .validation import validate
from .yaml_loader import Value, dump_yaml, parse_yaml, read_yaml

DEFAULT_CONFIG = "digits.yaml"


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment in a YAML file, changed by `section.field=value` overrides; None is the packaged digits.

    Relative paths inside the file (data.root, model.checkpoint, output) are kept as they are and so mean
    the current directory, not the file's. Raises ConfigError.
    """
    document = read_yaml(packaged_config_path(DEFAULT_CONFIG) if path is None else path)
    return validate(apply_overrides(document, overrides))


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
        is_equal = validate(parse_yaml(text.encode(), "it")) == config
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
        assert field_schema(tuple(name.split("."))) is not None, name
    before, after = _leaves(_data(old)), _leaves(_data(new))
    return [
        f"{name}: {shown(before[name])} -> {shown(after[name])}"
        for name in before
        if before[name] != after[name] and not any(f"{name}.".startswith(f"{ignored}.") for ignored in ignore)
    ]


def section_hash(config: ExperimentConfig, *sections: str) -> str:
    """SHA-256 (hex) of the settings of sections or fields (`"model"`, `"data.root"`, `"seed"`), in any order."""
    chosen = settings_of(config, *sections)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


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
