"""An exported file as a torch module: what is deployed runs where the model ran, in the one evaluation loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sparsevit_cli.errors import CheckpointError, DataError, NonFiniteError, in_one_line, pass_on
from sparsevit_cli.sizes import size_text

from .runtime import Program


class ProgramModule(nn.Module):
    """Images (B, C, H, W) to what the exported torch module gives for them, computed by a program on the CPU.

    Args:
        program: the loaded file.
        like: what the torch module gives for one image; outputs come in the same lists and dicts. A dict of a class
            that torch's pytrees do not know comes as a plain dict.
        name: what messages call the file.
        shape: (C, H, W) of the images that the file takes.
        one_image: True if the file takes one image at a time, and `like` is its dict of answers. Then a batch gives a
            list of such dicts, as torchvision's detectors do.

    `runs` counts how often the program ran.
    """

    def __init__(
        self, program: Program, like: object, *, name: str, shape: Sequence[int], one_image: bool = False
    ) -> None:
        super().__init__()
        self.program, self.name, self.one_image, self.runs = program, name, one_image, 0
        self.channels, *size = shape
        self.size = (size[0], size[1])
        leaves, self._structure = tree_flatten(plain(like))
        self._count = len(leaves)

    def forward(self, images: Tensor) -> Any:
        """Outputs on the device of the images.

        Raises DataError (images of another size), NonFiniteError, CheckpointError (the file does not run, or gives
        another number of outputs).
        """
        _, channels, height, width = images.shape
        if (channels, height, width) != (self.channels, *self.size):
            takes = f"{self.channels} channels and {size_text(self.size)} pixels"
            got = f"{channels} channels and {size_text((height, width))} pixels; {self.name} takes {takes} alone"
            raise DataError("images", got, "Score images of that size, or export at theirs.")
        on_cpu = images.detach().to("cpu", torch.float32).contiguous()
        parts = on_cpu.split(1) if self.one_image else [on_cpu]
        found = [self._run(part, images.device) for part in parts]
        return found if self.one_image else found[0]

    def _run(self, images: Tensor, device: torch.device) -> Any:
        try:
            outputs = self.program.run(images)
        except Exception as error:
            pass_on(error)
            got = f"does not run in {self.program.runtime} {self.program.version} ({in_one_line(error)})"
            raise CheckpointError(self.name, got, "Export the model again.") from error
        self.runs += 1
        if len(outputs) != self._count:
            got = f"gives {len(outputs)} outputs, the model gives {self._count}"
            raise CheckpointError(self.name, got, "Export the model again.")
        if not all(bool(output.isfinite().all()) for output in outputs if output.is_floating_point()):
            got = f"{self.program.runtime} gives NaN or infinite values"
            raise NonFiniteError(self.name, got, "Export in fp32, or weights that give finite outputs.")
        return tree_unflatten([output.to(device) for output in outputs], self._structure)


def plain(output: object) -> object:
    """`output`, with a plain dict in place of each dict whose class torch's pytrees do not know."""
    return tree_map(lambda leaf: plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, output)
