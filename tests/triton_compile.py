"""Compile every Triton kernel for a GPU that need not be there; prints one JSON line per compiled kernel.

    python triton_compile.py COMPUTE_CAPABILITY [few]

Run by test_triton.py in a process of its own, without Triton's interpreter: that one looks at neither types nor memory.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsevit_cli import windows
from sparsevit_cli.kernels import Affine, BlockWeights, Norm
from sparsevit_cli.kernels.triton import code as triton_code
from sparsevit_cli.kernels.triton.engine import TritonEngine, supports

FLOATS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPES = FLOATS | {torch.int64: "*i64", torch.int32: "*i32"}
ALIGNED = [["tt.divisibility", 16]]


class Compiled:
    """Stands for a kernel: instead of launching, compiles it for the arguments of the launch.

    As at a launch, integers that are 1 become constants, and what is a multiple of 16 is known to be one.
    """

    def __init__(self, kernel: Any, compute_capability: int) -> None:
        self.kernel, self.target, self.seen = kernel, GPUTarget("cuda", compute_capability, 32), set[str]()

    def __getitem__(self, grid: object) -> Any:
        return self.compile

    def compile(self, *args: object, num_warps: int = 4, num_stages: int = 3, **constants: object) -> None:
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False))
        constants |= {name: 1 for name, value in given.items() if type(value) is int and value == 1}
        signature = {name: _type(value) for name, value in given.items()} | dict.fromkeys(constants, "constexpr")
        aligned = [name for name, value in given.items() if _is_aligned(value)]
        what = json.dumps([signature, aligned, constants, num_warps, num_stages])
        if what in self.seen:
            return
        self.seen.add(what)
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): ALIGNED for name in aligned},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=self.target, options=options)
        pointers = sorted({kind for kind in signature.values() if kind in FLOATS.values()})
        told = {"kernel": self.kernel.__name__, "types": pointers, "shared": compiled.metadata.shared}
        print(json.dumps(told), flush=True)


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(value: object) -> bool:
    return isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)


def launch(
    channels: int,
    dtype: torch.dtype,
    *,
    norm_first: bool = True,
    padded: bool = True,
    side: int = 7,
    head_dim: int = 32,
) -> None:
    """A shifted block of V1 or V2, on more windows than one program compacts."""

    def affine(inner: int, outer: int) -> Affine:
        return Affine(torch.zeros(outer, inner, dtype=dtype), torch.zeros(outer, dtype=dtype))

    norm = Norm(torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 1e-5)
    heads = channels // head_dim
    block = BlockWeights(
        norm1=norm, qkv=affine(channels, 3 * channels), proj=affine(channels, channels), norm2=norm,
        fc1=affine(channels, 4 * channels), fc2=affine(4 * channels, channels), num_heads=heads,
        scale=head_dim**-0.5 if norm_first else 1.0, norm_first=norm_first,
        cosine_scale=None if norm_first else torch.ones(heads, 1, 1, dtype=dtype),
    )  # fmt: skip
    assert supports(block)
    window, shift = (side, side), (side // 2, side // 2)
    index = windows.window_token_index(20, 20, window, shift, "roll_first", torch.device("cpu")).repeat(20, 1)
    tokens, bias = torch.zeros(400, channels, dtype=dtype), torch.zeros(4, heads, side**2, side**2, dtype=dtype)
    bias_class = torch.zeros(len(index), dtype=torch.int64)
    TritonEngine().run_windows_(tokens, index, block, bias, bias_class, padded=padded)


def rank(batch: int, count: int, dtype: torch.dtype) -> None:
    index = windows.window_token_index(20, 20, (7, 7), (3, 3), "roll_first", torch.device("cpu"))
    x = torch.zeros(batch, 20, 20, 96, dtype=dtype)
    TritonEngine().score_and_rank(x, [index, index], count, "mean_abs_l2")


def launch_few() -> None:
    """Every kernel, in the types that matter most."""
    launch(96, torch.bfloat16)
    launch(96, torch.bfloat16, norm_first=False, padded=False)
    launch(384, torch.bfloat16, padded=False)  # does not fuse the MLP
    launch(176, torch.float32, head_dim=44)
    for batch, count in ((2, 3), (1, 1)):
        rank(batch, count, torch.bfloat16)


def launch_all() -> None:
    for dtype in FLOATS:
        for channels in (32, 96, 256 * 2 // dtype.itemsize, 768):  # one head; the narrowest, widest that fuse the MLP
            for norm_first in (True, False):
                for padded in (True, False):
                    launch(channels, dtype, norm_first=norm_first, padded=padded)
        for side, head_dim in ((12, 32), (7, 44)):
            launch(4 * head_dim, dtype, norm_first=False, side=side, head_dim=head_dim)
        for batch, count in ((2, 3), (1, 1)):
            rank(batch, count, dtype)


if __name__ == "__main__":
    capability, *only_few = sys.argv[1:]
    for name, kernel in list(vars(triton_code).items()):
        if name.endswith("_kernel"):
            setattr(triton_code, name, Compiled(kernel, int(capability)))
    launch_few() if only_few else launch_all()
