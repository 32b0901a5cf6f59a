"""The winner file: what the search found, in a YAML that finetune, profile and export read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import write_atomic
from .config.fields import shown
from .config.paths import as_path, is_there, names_a_file
from .config.yaml_loader import dump_yaml, parse_yaml, read_yaml
from .documents import understood
from .errors import CheckpointError, ConfigError
from .sparsity import SparsityConfig


def write_winner(path: Path, config: SparsityConfig, about: Mapping[str, Any]) -> None:
    """Write `config` and what is known of it (metric, cost, budget, device)."""
    ratios: Any = [list(stage) for stage in config.ratios]
    write_atomic(path, dump_yaml({"ratios": ratios, **about}))


def read_winner(path: Path) -> tuple[SparsityConfig, dict[str, Any]]:
    """The configuration of a winner file and the rest of it. Raises CheckpointError where it is unusable."""
    if is_there(path, "--ratios") and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(str(path), "it is no file", "Give a winner.yaml written by `sparsevit search`.")
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
    return parse_winner(text, depths)[0]


def parse_winner(text: str, depths: Sequence[int]) -> tuple[SparsityConfig, dict[str, Any]]:
    """As `parse_ratios`, with the rest of a winner file."""
    if text.endswith((".yaml", ".yml", ".json")) or names_a_file(text):
        path = as_path(text, "--ratios")
        if not is_there(path, "--ratios"):
            raise ConfigError("--ratios", f"there is no file {path}", "Give a number, a nested list or a winner file.")
        winner, about = read_winner(path)
        return SparsityConfig.from_ratios(winner, depths), about
    value: Any = parse_yaml(text.encode("utf-8", "surrogateescape"), "--ratios").data
    if isinstance(value, (str, dict)) or value is None:
        got = f"{shown(text)} is neither a number, a nested list nor a file"
        raise ConfigError("--ratios", got, "Give e.g. 0.6, [[.6],[0],[.2,.4,.5],[0]] or runs/x/search/winner.yaml.")
    return SparsityConfig.from_ratios(value, depths), {}
