"""Shared test settings: small deterministic models, one thread so that runs repeat to the bit."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anybody imports torch

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports Triton

from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.profiling import neighbours
from sparsevit_cli.workflows import doctor

settings.register_profile("sparsevit", deadline=None, derandomize=True)
settings.load_profile("sparsevit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged goes to another process, as UTF-8: names of files need not be."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _unwatched() -> Iterator[None]:
    """Tests run beside anything; `watched` looks at the machine again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "machine_watch", lambda device: neighbours.UNWATCHED.watch)
        patch.setattr(neighbours, "GLANCE_SECONDS", 0.0)
        patch.setattr(doctor, "TWICE_SECONDS", 0.01)
        yield


@pytest.fixture
def known_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that a test makes known are forgotten after it."""
    for name in ("KINDS", "_classes", "_TYPES"):
        monkeypatch.setattr(kinds, name, dict(getattr(kinds, name)))


MACHINE_WATCH, GLANCE_SECONDS = neighbours.machine_watch, neighbours.GLANCE_SECONDS


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs on this machine counts."""
    monkeypatch.setattr(neighbours, "machine_watch", MACHINE_WATCH)
    monkeypatch.setattr(neighbours, "GLANCE_SECONDS", GLANCE_SECONDS)
