"""What is fed to a model that is measured, and the state it is put in meanwhile."""

from __future__ import annotations

import copy
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.swin.geometry import fixed_image_size, input_channels

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of the configuration, as torch names them."""


def torch_dtype(precision: str) -> torch.dtype:
    """What torch computes in, where a runtime computes in `precision`: float32 for int8, which torch has not."""
    return TORCH_DTYPE.get(precision, torch.float32)


def trained_in(precision: str, device: torch.device) -> str:
    """The precision that a training takes on `device`: fp32 for bf16 on a CPU that emulates it, far slower."""
    return "fp32" if precision == "bf16" and device.type == "cpu" and not computes_bf16() else precision


def computes_bf16() -> bool:
    """True if this CPU has instructions for bfloat16. With AVX-512 alone oneDNN emulates it, 2.5 times slower."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


InputSize = int | Sequence[int] | Tensor
"""A side in pixels, (H, W), (C, H, W), or an example input (B, C, H, W)."""


def image_shape(model: nn.Module, input_size: InputSize) -> tuple[int, int, int]:
    """(C, H, W) of one image. Raises ConfigError."""
    if isinstance(input_size, Tensor):
        size = tuple(input_size.shape[1:]) if input_size.ndim == 4 else ()
    elif isinstance(input_size, int):
        size = (input_channels(model), input_size, input_size)
    else:
        size = tuple(input_size)
        size = (input_channels(model), *size) if len(size) == 2 else size
    if len(size) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        got = f"{tuple(input_size.shape) if isinstance(input_size, Tensor) else input_size!r}"
        raise ConfigError("input size", f"{got} is no image size", "Give 224, (224, 320) or (3, 224, 320) in pixels.")
    expected = fixed_image_size(model)
    if expected is not None and expected != size[1:]:
        got = f"{size[1]} x {size[2]} pixels, the model is built for {expected[0]} x {expected[1]}"
        raise ConfigError("input size", got, "Build it with img_size=..., or with strict_img_size=False.")
    return size


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; cpu where it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def model_dtype(model: nn.Module) -> torch.dtype:
    """Type of the model's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example_input(
    model: nn.Module,
    input_size: InputSize,
    batch_size: int = 1,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Tensor:
    """A batch (B, C, H, W) of seeded normal noise, or the example given as `input_size` itself.

    `device` and `dtype` default to the model's. Raises ConfigError.
    """
    device, dtype = device or model_device(model), dtype or model_dtype(model)
    shape = image_shape(model, input_size)
    if isinstance(input_size, Tensor):
        return input_size.to(device, dtype)
    if batch_size < 1:
        raise ConfigError("batch size", f"{batch_size}", "Give at least 1.")
    if device.type == "meta":
        return torch.empty(batch_size, *shape, device=device, dtype=dtype)
    noise = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device, dtype)


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself where it already is on `device` in `dtype`, else a copy that is."""
    here = all(t.device == device for t in (*model.parameters(), *model.buffers()))
    if here and all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).to(device, dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation and inference mode; every module's training flag is put back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


class Measured(ABC):
    """A measurement with details that compares and divides as its one number, `float(...)`."""

    @abstractmethod
    def __float__(self) -> float:
        """The number."""

    def __lt__(self, other: SupportsFloat) -> bool:
        return float(self) < float(other)

    def __le__(self, other: SupportsFloat) -> bool:
        return float(self) <= float(other)

    def __gt__(self, other: SupportsFloat) -> bool:
        return float(self) > float(other)

    def __ge__(self, other: SupportsFloat) -> bool:
        return float(self) >= float(other)

    def __truediv__(self, other: SupportsFloat) -> float:
        return float(self) / float(other)

    def __rtruediv__(self, other: SupportsFloat) -> float:
        return float(other) / float(self)
