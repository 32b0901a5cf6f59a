"""Modules of a model that are told apart: what runs inside each of them, seen by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

from torch import nn

L = TypeVar("L")

Parts = Mapping[str, Sequence[nn.Module]]
"""Modules by the name of their part, in the order of the forward pass; no module in two parts (`Task.parts`)."""

REST = "rest"
"""What runs in no part."""


@contextmanager
def calls_told(
    labelled: Iterable[tuple[nn.Module, L]], enter: Callable[[L], None], leave: Callable[[L], None]
) -> Iterator[None]:
    """Call `enter` and `leave` with its label around every call of a module inside the block."""
    with ExitStack() as stack:
        for module, label in labelled:
            before, after = partial(_told, enter, label), partial(_told, leave, label)
            before.keeps_nothing = after.keeps_nothing = True  # type: ignore[attr-defined]
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def labelled(parts: Parts) -> list[tuple[nn.Module, str]]:
    """Every module with the name of its part."""
    return [(module, name) for name, modules in parts.items() for module in modules]


def _told(tell: Callable[[L], None], label: L, *_: object) -> None:
    tell(label)
