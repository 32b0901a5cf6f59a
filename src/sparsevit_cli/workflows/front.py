"""search --budgets and --pareto: several winners from one ledger."""

from __future__ import annotations

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.search.budget import CostMetric, parse_budget

from .search import SearchSummary, search
from .session import Session

SHARES = ("90%", "80%", "70%", "60%", "50%")
"""Of dense: the budgets of --pareto."""


def search_front(session: Session, *, budgets: str | None = None, workers: str | None = None) -> SearchSummary:
    """One winner for each of `budgets` (`40ms,35ms`, `3G,2G` or shares of dense), or for all shares that are reachable.

    The first one typed is the winner that other commands take; without `budgets` it is that of the configuration.
    Raises ConfigError for budgets of two kinds, and what `search` raises.
    """
    section = session.config.search
    is_of_macs = section.budget_latency is None and section.budget_macs is not None
    share_of: CostMetric = "macs" if is_of_macs else "latency_ms"
    texts = SHARES if budgets is None else tuple(text.strip() for text in budgets.split(","))
    requests = {text: parse_budget(text, share_of) for text in texts}
    kinds = {request.metric for request in requests.values()}
    if len(kinds) > 1:
        got = f"{budgets} holds both latencies and multiply-adds"
        raise ConfigError("--budgets", got, "Search for one kind at a time: the ledger keeps what was paid.")
    configured = section.budget_latency is not None or section.budget_macs is not None
    if budgets is not None or not configured:
        first = next(iter(requests)) if budgets is not None else "70%"
        requests.pop(first)
        field = "budget_macs" if kinds == {"macs"} else "budget_latency"
        section = section.model_copy(update={"budget_latency": None, "budget_macs": None, field: first})
        session = session.replaced(config=session.config.model_copy(update={"search": section}))
    return search(session, further=requests, leave_out_unreachable=budgets is None, workers=workers)
