"""Which engine computes a model: the portable one, or the C++ or Triton one on devices that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch

from .cpp import compiled
from .engine import Engine
from .fallback import LimitedEngine, warn_once
from .portable import PORTABLE

Kernels = Literal["auto", "portable", "native", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)

Wrap = Callable[[Engine], Engine]
"""Makes of the engine that was chosen another one around it."""
_wrap: ContextVar[Wrap | None] = ContextVar("engine_wrap", default=None)


@contextmanager
def using(wrap: Wrap) -> Iterator[None]:
    """Inside the block, every choice gives `wrap(engine)`: a timed engine, say, or the oracle."""
    token = _wrap.set(wrap)
    try:
        yield
    finally:
        _wrap.reset(token)


def chosen(kernels: str, device: torch.device) -> Engine:
    """The engine that `kernels` comes to on `device`; a stage asks once in every forward.

    `auto` is native on CPUs of a kind that was measured, and portable elsewhere: no GPU was measured yet. The portable
    engine runs when `native` cannot be compiled, which `auto` tells too, and when `triton` cannot run: without Triton,
    or on a CPU outside of Triton's interpreter. The reason is told once.
    """
    name = _named(kernels, device)
    engine, reason = _engine(name, device.type)
    if kernels == name and engine is None:
        warn_once(reason)
    elif kernels == name and isinstance(engine, LimitedEngine):
        engine = replace(engine, warns=True)
    return _wrapped(engine or PORTABLE)


def beside_modules() -> Engine:
    """The engine of a stage that timm's own modules compute: it ranks, and its `moves` gather and scatter."""
    return _wrapped(PORTABLE)


def _wrapped(engine: Engine) -> Engine:
    wrap = None if torch.compiler.is_compiling() else _wrap.get()  # torch.compile of torch 2.11 cannot read it
    return engine if wrap is None else wrap(engine)


def running(kernels: str, device: torch.device) -> str:
    """Name and version of what `kernels` comes to on `device`: two names that are equal are the same code."""
    engine = _engine(_named(kernels, device), device.type)[0] or PORTABLE
    return f"{engine.name} {engine.version()}".rstrip()


def explained(kernels: str, device: torch.device) -> str:
    """`running`, and the reason when it is not what was wanted."""
    if kernels == "auto" and device.type == "cpu" and not compiled.may_be_measured():
        return f"{running(kernels, device)} ({compiled.UNMEASURED})"  # nothing is compiled to say so
    wanted = "native" if kernels == "auto" and device.type == "cpu" else _named(kernels, device)
    reason = _engine(wanted, device.type)[1]
    return running(kernels, device) + (f" ({reason})" if reason else "")


def _named(kernels: str, device: torch.device) -> str:
    """`kernels`, or what `auto` stands for."""
    if kernels != "auto":
        return kernels
    if device.type != "cpu" or not compiled.may_be_measured():
        return "portable"
    native, reason = _engine("native", device.type)
    if native is None:
        warn_once(reason)
    return "native" if native is not None and compiled.is_measured() else "portable"


@lru_cache
def _engine(name: str, device_type: str) -> tuple[Engine | None, str]:
    """An engine, or None and why it cannot be taken."""
    try:
        return _MAKERS[name](device_type), ""
    except RuntimeError as error:
        return None, str(error)


def _native(device_type: str) -> Engine:
    if device_type != "cpu":
        raise RuntimeError(f"the C++ kernels are for CPUs, not for {device_type}")
    from .cpp import native

    native.check_structures()
    return native.NativeEngine()


def _triton(device_type: str) -> Engine:
    try:
        import triton

        if device_type != "cuda" and not triton.knobs.runtime.interpret:
            raise RuntimeError(f"Triton has no {device_type} backend here")
        from .triton.engine import TritonEngine
    except (ImportError, AttributeError) as error:  # no Triton, or one without knobs
        raise RuntimeError(f"Triton cannot be used ({error})") from error
    return TritonEngine()


_MAKERS: dict[str, Callable[[str], Engine]] = {
    "portable": lambda _device_type: PORTABLE,
    "native": _native,
    "triton": _triton,
}
"""By name: makes the engine for a type of device. Raises RuntimeError with the reason when it cannot."""
