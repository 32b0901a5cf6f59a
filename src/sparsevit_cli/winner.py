"""The winner file: what the search found, in a YAML that finetune, profile and export read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .atomic import write_atomic
from .config.yaml_loader import parse_yaml, read_yaml
from .documents import understood
from .errors import CheckpointError, ConfigError
from .sparsity import SparsityConfig


def write_winner(path: Path, config: SparsityConfig, about: Mapping[str, object]) -> None:
    """Write `config` and what is known of it (metric, cost, budget, device)."""
    ratios = [list(stage) for stage in config.ratios]
    text = yaml.safe_dump({"ratios": ratios, **about}, sort_keys=False, default_flow_style=None, width=100)
    write_atomic(path, text)


def read_winner(path: Path) -> tuple[SparsityConfig, dict[str, Any]]:
    """The configuration of a winner file and the rest of it. Raises CheckpointError where it is unusable."""
    try:
        document = read_yaml(path).data
        if not isinstance(document, dict) or "ratios" not in document:
            raise CheckpointError(str(path), "it has no `ratios`", "Give a winner.yaml written by `sparsevit search`.")
        ratios: Any = document["ratios"]
        with understood(path, "Search again: sparsevit search"):
            return SparsityConfig.from_ratios(ratios), document
    except ConfigError as error:
        raise CheckpointError(str(path), f"it cannot be used: {error}", "Search again: sparsevit search") from error


def parse_ratios(text: str, depths: Sequence[int]) -> SparsityConfig:
    """Ratios as typed: one number for everywhere, a nested list, or the path of a winner file."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        if not path.is_file():
            raise ConfigError("--ratios", f"there is no file {text}", "Give a number, a nested list or a winner file.")
        return SparsityConfig.from_ratios(read_winner(path)[0], depths)
    value: Any = parse_yaml(text.encode(), "--ratios").data
    if isinstance(value, (str, dict)) or value is None:
        got = f"{text!r} is neither a number, a nested list nor a file"
        raise ConfigError("--ratios", got, "Give e.g. 0.6, [[.6],[0],[.2,.4,.5],[0]] or runs/x/search/winner.yaml.")
    return SparsityConfig.from_ratios(value, depths)
