"""Budgets: what a configuration may cost, how users write it, and whether it can be met at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.errors import BudgetError, ConfigError
from sparsevit_cli.sparsity import MAX_TENTHS, SearchSpace, SparsityConfig

CostMetric = Literal["latency_ms", "macs"]
"""latency_ms: milliseconds per batch on the target device; macs: multiply-adds per image."""

CostScope = Scope | Literal["features"]
"""What a cost is of; `features` are backbone and neck, which an exported file holds both of."""

Cost = Callable[[SparsityConfig], float]

FIELD: dict[str, str] = {"latency_ms": "search.budget_latency", "macs": "search.budget_macs"}
"""Configuration field of each metric: how messages name a budget."""

SHARES = "90%,80%,70%,60%,50%"
"""Of dense: the budgets of `search --pareto`."""

COST_NAME: dict[str, str] = {"latency_ms": "latency", "macs": "multiply-adds"}

_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*"
_UNITS: dict[str, dict[str, Decimal]] = {
    "latency_ms": {"ms": Decimal(1), "s": Decimal(1000)},
    "macs": {"g": Decimal(10**9), "m": Decimal(10**6)},
}
_ALLOWED = {
    "latency_ms": "allowed are milliseconds (50ms), seconds (0.05s) or a share of dense (70%)",
    "macs": "allowed are multiply-adds per image (3G, 450M) or a share of dense (60%)",
}


def format_cost(cost: float, metric: CostMetric) -> str:
    """A cost with its unit and four digits, e.g. `10.2 ms`, `3.05 GMACs` or `450 MMACs`."""
    if metric == "latency_ms":
        return f"{_four_digits(cost)} ms"
    return f"{_four_digits(cost / 1e9)} GMACs" if cost >= 1e9 else f"{_four_digits(cost / 1e6)} MMACs"


def _four_digits(value: float) -> str:
    return f"{float(f'{value:.4g}'):g}"


@dataclass(frozen=True)
class Budget:
    """Most that a configuration may cost: `limit` in milliseconds per batch or multiply-adds per image.

    `scope` says of what, where a model has more than one. Raises ConfigError unless the limit is positive and finite.
    """

    limit: float
    metric: CostMetric
    scope: CostScope | None = None

    def __post_init__(self) -> None:
        if self.metric not in get_args(CostMetric):
            got = f"{self.metric!r}; allowed are {' and '.join(get_args(CostMetric))}"
            raise ConfigError("budget metric", got, "Choose one of them.")
        _check_positive(FIELD[self.metric], self.limit, "a positive number is needed")

    def allows(self, cost: float) -> bool:
        """True where `cost` is within the limit (the limit itself is)."""
        return cost <= self.limit

    def __str__(self) -> str:
        return f"{format_cost(self.limit, self.metric)}{of_scope(self.scope)}"


@dataclass(frozen=True)
class BudgetRequest:
    """A budget as the user wrote it: absolute (milliseconds, multiply-adds) or a share of dense (0.7 is 70 %).

    `scope` says of what, where a model has more than one: messages name it then. A share above 1 is allowed; the search
    then returns dense and says so. Raises ConfigError.
    """

    value: float
    unit: Literal["absolute", "share"]
    metric: CostMetric
    scope: CostScope | None = None

    def __post_init__(self) -> None:
        _check_positive(FIELD[self.metric], self.value, _ALLOWED[self.metric])

    def resolve(self, dense_cost: float) -> Budget:
        """The budget in the metric's own unit, given what dense costs."""
        return Budget(self.value * dense_cost if self.unit == "share" else self.value, self.metric, self.scope)

    def __str__(self) -> str:
        if self.unit == "absolute":
            return f"{format_cost(self.value, self.metric)}{of_scope(self.scope)}"
        of = "dense" if self.scope is None else f"the dense {scope_name(self.scope)}'s {COST_NAME[self.metric]}"
        return f"{self.value * 100:g}% of {of}"


def of_scope(scope: CostScope | None) -> str:
    """` of the backbone`, or nothing where there is one scope."""
    return "" if scope is None else f" of the {scope_name(scope)}"


def scope_name(scope: CostScope) -> str:
    """A scope in words."""
    return "backbone and neck" if scope == "features" else scope


def parse_budgets(latency: str | None, macs: str | None) -> tuple[BudgetRequest, ...]:
    """Those that are given, latency first. Raises ConfigError."""
    requests = ((latency, parse_latency_budget), (macs, parse_macs_budget))
    return tuple(parse(text) for text, parse in requests if text is not None)


def parse_latency_budget(text: str) -> BudgetRequest:
    """`50ms`, `0.05s` or `70%` (of dense). Raises ConfigError with what is allowed."""
    return _parse(text, "latency_ms")


def parse_macs_budget(text: str) -> BudgetRequest:
    """`3G`, `450M` (multiply-adds per image) or `60%` (of dense). Raises ConfigError with what is allowed."""
    return _parse(text, "macs")


def parse_several(texts: str, *, latency: str | None, macs: str | None) -> dict[str, BudgetRequest]:
    """Budgets of one kind by their texts: `40ms,35ms`, `3G,2G`, or shares of dense.

    A share is of the multiply-adds if an experiment, with the budgets `latency` and `macs`, has one of those alone.
    Raises ConfigError.
    """
    share_of: CostMetric = "macs" if latency is None and macs is not None else "latency_ms"
    requests = {text: _parse_any(text, share_of) for text in map(str.strip, texts.split(","))}
    if len({request.metric for request in requests.values()}) > 1:
        got = f"{texts} holds both latencies and multiply-adds"
        raise ConfigError("--budgets", got, "Search for one kind at a time: the ledger keeps what was paid.")
    return requests


def _parse_any(text: str, share_of: CostMetric) -> BudgetRequest:
    if text.endswith("%"):
        return _parse(text, share_of)
    return _parse(text, "macs" if text.upper().endswith(("G", "M")) else "latency_ms")


def _parse(text: str, metric: CostMetric) -> BudgetRequest:
    units = _UNITS[metric] | {"%": Decimal(1) / 100}
    match = re.fullmatch(f"{_NUMBER}({'|'.join(units)})\\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ConfigError(FIELD[metric], f"{text!r} is not a budget; {_ALLOWED[metric]}", "Write it like that.")
    number, unit = match[1], match[2].lower()
    value = float(Decimal(number) * units[unit])
    _check_positive(FIELD[metric], value, _ALLOWED[metric], shown=text)
    return BudgetRequest(value, "share" if unit == "%" else "absolute", metric)


def _check_positive(what: str, value: float, allowed: str, shown: object = None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        got = f"{value if shown is None else shown!r} is not a positive, finite number; {allowed}"
        raise ConfigError(what, got, "Give a budget above zero.")


@dataclass(frozen=True)
class Feasibility:
    """What a budget can be compared with before anything is evaluated; all in the unit of `metric`, of `scope`."""

    dense: float
    middle: float
    sparsest: float
    limit: float
    metric: CostMetric
    scope: CostScope | None = None

    @property
    def budget(self) -> Budget:
        """The budget."""
        return Budget(self.limit, self.metric, self.scope)

    @property
    def reachable(self) -> bool:
        """True where the sparsest configuration, or dense, is within the limit."""
        return min(self.dense, self.sparsest) <= self.limit

    @property
    def dense_fits(self) -> bool:
        """True where nothing needs to be pruned."""
        return self.dense <= self.limit


def feasibility(space: SearchSpace, cost: Cost, request: BudgetRequest) -> Feasibility:
    """The row shown before a search: three costs, nothing evaluated."""
    dense, middle, sparsest = (float(cost(config)) for config in (space.dense, space.middle, space.sparsest))
    return Feasibility(dense, middle, sparsest, request.resolve(dense).limit, request.metric, request.scope)


def check_reachable(budget: Budget, dense: float, sparsest: float) -> None:
    """Raise BudgetError with the reachable range where neither dense nor the sparsest configuration fits.

    The sparsest configuration is taken as the cheapest one; where noise or overhead makes dense cheaper, dense is.
    """
    low, high = sorted((dense, sparsest))
    if budget.allows(low):
        return
    lowest = format_cost(_round_up(low), budget.metric)  # so that the number shown is itself within reach
    which = "sparsest configuration" if sparsest <= dense else "dense model, which is cheaper than the sparsest"
    got = f"{budget} is below the {which} ({lowest}); reachable is {lowest} to {format_cost(high, budget.metric)}"
    do = f"Raise it, or search.max_ratio where that is below {MAX_TENTHS / 10}."
    raise BudgetError(FIELD[budget.metric], got, do)


def _round_up(value: float, digits: int = 4) -> float:
    if value <= 0:
        return value
    exact = Decimal(repr(value))
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return float(math.ceil(exact / step) * step)
