"""Search under a budget: strategies, budgets, latency-table model, ledger. No torch: it runs on lambdas."""

from .additive import AdditiveCost
from .budget import (
    Budget,
    BudgetRequest,
    Cost,
    CostMetric,
    Feasibility,
    feasibility,
    format_cost,
    parse_latency_budget,
    parse_macs_budget,
)
from .correlation import spearman
from .engine import Evaluate, Known, Strategy, StrategyName, search_sparsity
from .latency_table import LatencyTable, TableError
from .ledger import LatencyRecord, Ledger, LedgerScope
from .pareto import pareto_front
from .results import Evaluation, Progress, SearchResult, best_first

__all__ = [
    "AdditiveCost",
    "Budget",
    "BudgetRequest",
    "Cost",
    "CostMetric",
    "Evaluate",
    "Evaluation",
    "Feasibility",
    "Known",
    "LatencyRecord",
    "LatencyTable",
    "Ledger",
    "LedgerScope",
    "Progress",
    "SearchResult",
    "Strategy",
    "StrategyName",
    "TableError",
    "best_first",
    "feasibility",
    "format_cost",
    "pareto_front",
    "parse_latency_budget",
    "parse_macs_budget",
    "search_sparsity",
    "spearman",
]
