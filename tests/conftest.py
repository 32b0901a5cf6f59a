"""Shared test settings: small deterministic models, one thread so that runs repeat to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparsevit", deadline=None, derandomize=True)
settings.load_profile("sparsevit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
