"""Budgets as users write them, and the feasibility table."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.errors import BudgetError, ConfigError
from sparsevit_cli.search import (
    Budget,
    feasibility,
    format_cost,
    parse_latency_budget,
    parse_macs_budget,
)
from sparsevit_cli.search.budget import check_reachable
from sparsevit_cli.sparsity import SearchSpace


@pytest.mark.parametrize(
    ("text", "limit"),
    [("50ms", 50), ("0.05s", 50), (" 12.5 MS ", 12.5), ("1e1ms", 10), (".5ms", 0.5), ("70%", 14), ("130%", 26)],
)
def test_latency_budgets(text, limit):
    assert parse_latency_budget(text).resolve(dense_cost=20) == Budget(limit, "latency_ms")


@pytest.mark.parametrize(
    ("text", "limit"), [("3G", 3e9), ("4.36G", 4.36e9), ("450M", 4.5e8), ("60%", 2.4e9), ("3 g", 3e9)]
)
def test_macs_budgets(text, limit):
    assert parse_macs_budget(text).resolve(dense_cost=4e9) == Budget(limit, "macs")


def test_a_hundred_percent_is_dense_itself():
    assert parse_latency_budget("100%").resolve(10.123456789).allows(10.123456789)


BAD = [
    "",
    "50",
    "ms",
    "-5ms",
    "0ms",
    "0%",
    "-1%",
    "nanms",
    "infms",
    "1e999ms",
    "1,5ms",
    "1_0ms",
    "5 ms 3",
    "\u0665ms",
    "0x5ms",
]


@pytest.mark.parametrize("text", [*BAD, "3G", "450M", "5us"])
def test_latency_budgets_that_mean_nothing(text):
    with pytest.raises(ConfigError, match=r"search\.budget_latency: .*50ms.*70%") as caught:
        parse_latency_budget(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", [*BAD, "50ms", "0.05s", "3GFLOPs", "0G"])
def test_macs_budgets_that_mean_nothing(text):
    with pytest.raises(ConfigError, match=r"search\.budget_macs: .*3G.*60%"):
        parse_macs_budget(text)


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, True, "5"])
def test_budget_is_positive_and_finite(limit):
    with pytest.raises(ConfigError):
        Budget(limit, "macs")


def test_budget_of_an_unknown_metric():
    with pytest.raises(ConfigError, match="latency_ms and macs"):
        Budget(1, "flops")


@pytest.mark.parametrize(
    ("cost", "metric", "text"),
    [
        (10.2, "latency_ms", "10.2 ms"),
        (12345.6, "latency_ms", "12350 ms"),
        (0.01234, "latency_ms", "0.01234 ms"),
        (3.05e9, "macs", "3.05 GMACs"),
        (4.5e8, "macs", "450 MMACs"),
        (1.2e4, "macs", "0.012 MMACs"),
    ],
)
def test_costs_are_shown_with_unit_and_four_digits(cost, metric, text):
    assert format_cost(cost, metric) == text


def test_requests_are_shown_as_written():
    assert str(parse_latency_budget("70%")) == "70% of dense"
    assert str(parse_macs_budget("3.1G")) == "3.1 GMACs"


def test_feasibility_table():
    space = SearchSpace((2, 2, 6, 2))
    request = parse_latency_budget("6ms")
    table = feasibility(space, lambda c: 10 - sum(map(sum, c.tenths)) / 8, request)
    assert (table.dense, table.middle, table.sparsest, table.limit) == (10, 7, 4, 6)
    assert table.reachable
    assert not table.dense_fits
    assert feasibility(space, lambda c: 8.0, parse_latency_budget("70%")).limit == 5.6
    assert not feasibility(space, lambda c: 7.0, request).reachable
    assert feasibility(space, lambda c: 6.0, request).dense_fits


@given(
    st.floats(1e-3, 1e6, exclude_min=True),
    st.floats(1e-3, 1e6),
    st.sampled_from([("latency_ms", 1, parse_latency_budget), ("macs", 1e6, parse_macs_budget)]),
)
def test_the_lowest_budget_named_is_itself_within_reach(dense, sparsest, unit):
    """What the message says can be typed back and works."""
    metric, scale, parse = unit
    low = min(dense, sparsest) * scale
    with pytest.raises(BudgetError) as caught:
        check_reachable(Budget(low * 0.999, metric), dense * scale, sparsest * scale)
    lowest = caught.value.got.split("reachable is ")[1].split(" to ")[0]
    budget = parse(lowest.replace("MACs", "")).resolve(0)
    assert low <= budget.limit <= low * 1.0011
    check_reachable(budget, dense * scale, sparsest * scale)
