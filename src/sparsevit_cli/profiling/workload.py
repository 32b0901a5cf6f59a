"""What is measured: a module, and one batch of inputs that it takes. Every figure of a profile is one of a workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.swin import SparseStage, get_sparsity, set_sparsity, sparse_stages

from .device import resolve_device
from .inputs import InputSize, example_input, image_shape, model_device, model_dtype, placed, uncompiled


@dataclass(frozen=True, eq=False)
class Workload:
    """One call of `model(inputs)`.

    `inputs` is a tensor (B, C, H, W), or tensors in lists, tuples and dicts, with one floating-point tensor at least.
    `image_size` is (height, width) in pixels of one image, `batch` the number of samples. Where `scope` is "backbone",
    `model` is the backbone alone. The model is called inside `loaded(model)`, which makes it work as hard as it can
    (`Task.at_full_load`).
    """

    model: nn.Module
    inputs: Any
    image_size: tuple[int, int]
    batch: int
    scope: Scope = "model"
    loaded: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext

    def run(self) -> Any:
        """The outputs of one forward pass."""
        with self.loaded(uncompiled(self.model)):
            return self.model(self.inputs)

    def of(self, model: nn.Module) -> Workload:
        """Another model on the same inputs."""
        return replace(self, model=model)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in `inputs`, in the order of torch's pytrees."""
        return tuple(leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor))

    @property
    def images(self) -> Tensor:
        """The first floating-point tensor in `inputs`: its device and type are the workload's."""
        return next(tensor for tensor in self.tensors if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.images.device

    def __str__(self) -> str:
        if isinstance(self.inputs, Tensor):
            return f"forward of {tuple(self.inputs.shape)}"
        return f"forward of {self.batch} x {self.image_size[0]} x {self.image_size[1]} pixels"


def image_workload(
    model: nn.Module,
    input_size: InputSize = 224,
    batch_size: int = 1,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    scope: Scope = "model",
    seed: int = 0,
) -> Workload:
    """The workload of a model that takes a batch of images (B, C, H, W): seeded noise, or an example batch.

    `input_size` is a side, (H, W), (C, H, W) or the example (then `batch_size` is not used). With another `device` or
    `dtype` than the model's, a copy of the model is measured. Raises ConfigError.
    """
    there = model_device(model) if device is None else resolve_device(device)
    as_type = dtype or model_dtype(model)
    _, height, width = image_shape(model, input_size)
    x = example_input(model, input_size, batch_size, device=there, dtype=as_type, seed=seed)
    measured = model if device is None and dtype is None else placed(model, there, as_type)
    return Workload(measured, x, (height, width), len(x), scope)


@contextmanager
def sparsity_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's ratios back at the end. Raises ConfigError where the model is not sparse."""
    before, exact = get_sparsity(model), sparse_stages(model)[0].as_timm
    try:
        yield
    finally:
        set_sparsity(model, before, exact=exact)


@contextmanager
def dense_meanwhile(model: nn.Module) -> Iterator[None]:
    """The model at ratio 0 inside the block, whether it is sparse or not."""
    if not any(isinstance(module, SparseStage) for module in model.modules()):
        yield
        return
    with sparsity_kept(model):
        set_sparsity(model, 0.0)
        yield
