"""Latencies and a `LatencyTable` of programs: what a runtime makes of an exported file, one program per configuration.

Nothing can be marked inside a program, so whole programs are measured, as `search.table_design` says. A program holds
its weights, so few are loaded at once: groups of them are measured in turns, each beside the same reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.search.table_design import TableDesign
from sparsevit_cli.sparsity import SparsityConfig

from .latency import Candidate, Latency, measure_interleaved

Load = Callable[[SparsityConfig], Candidate]
"""A configuration to a function that runs its program once."""
AT_ONCE = 8
"""Programs that are loaded at the same time, besides the reference."""
CPU = torch.device("cpu")


def measure_programs(
    load: Load,
    configs: Sequence[SparsityConfig],
    *,
    seconds: float = 1.0,
    rounds: int = 15,
    strict: bool = False,
    on_share: Callable[[float], None] = lambda share: None,
    **settings: Any,
) -> dict[SparsityConfig, Latency]:
    """Latency of the program of each configuration; the first is the reference of `speedup`, measured in every group.

    Its own latency is that of the first group. `on_share` is told the share done after each group. Other
    `settings`, and errors, as in `measure_interleaved`.
    """
    reference, *others = dict.fromkeys(configs)
    kept = load(reference)
    found: dict[SparsityConfig, Latency] = {}
    for first in range(0, max(len(others), 1), AT_ONCE):
        group = {str(config): config for config in others[first : first + AT_ONCE]}
        measured = measure_interleaved(
            {str(reference): kept, **{name: load(config) for name, config in group.items()}},
            device=CPU,
            seconds=seconds,
            rounds=rounds,
            strict=strict,
            **settings,
        )
        found.setdefault(reference, measured[str(reference)])
        found |= {config: measured[name] for name, config in group.items()}
        on_share(min(1.0, (first + AT_ONCE) / max(len(others), 1)))
    return found


def measure_program_table(
    load: Load, design: TableDesign, identity: Mapping[str, Any], *, rounds: int = 6, **settings: Any
) -> LatencyTable:
    """The latency table of a model from the programs of `design`. Settings and errors as in `measure_programs`."""
    measured = measure_programs(load, design.configs(), rounds=rounds, strict=True, **settings)
    reference_ms = measured[design.sparsest].median_ms
    return design.table({config: reference_ms / latency.speedup for config, latency in measured.items()}, identity)
