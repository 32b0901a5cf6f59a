"""Shared test settings: small deterministic models, one thread so that runs repeat to the bit."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports Triton

settings.register_profile("sparsevit", deadline=None, derandomize=True)
settings.load_profile("sparsevit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
