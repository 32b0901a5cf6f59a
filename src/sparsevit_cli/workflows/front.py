"""search --budgets and --pareto: several winners from one ledger."""

from __future__ import annotations

from sparsevit_cli.search.budget import SHARES, parse_several

from .search import SearchSummary, search
from .session import Session


def search_front(session: Session, *, budgets: str | None = None, workers: str | None = None) -> SearchSummary:
    """One winner for each of `budgets` (`40ms,35ms`, `3G,2G` or shares of dense), or for all shares that are reachable.

    The first one typed is the winner that other commands take; without `budgets` it is that of the configuration.
    Raises ConfigError for budgets of two kinds, and what `search` raises.
    """
    section = session.config.search
    texts = SHARES if budgets is None else budgets
    requests = parse_several(texts, latency=section.budget_latency, macs=section.budget_macs)
    configured = section.budget_latency is not None or section.budget_macs is not None
    if budgets is not None or not configured:
        first = next(iter(requests)) if budgets is not None else "70%"
        is_of_macs = requests.pop(first).metric == "macs"
        field = "budget_macs" if is_of_macs else "budget_latency"
        section = section.model_copy(update={"budget_latency": None, "budget_macs": None, field: first})
        session = session.replaced(config=session.config.model_copy(update={"search": section}))
    return search(session, further=requests, leave_out_unreachable=budgets is None, workers=workers)
