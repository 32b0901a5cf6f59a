"""Compile every Triton kernel for a GPU that need not be there; prints one JSON line per compiled kernel.

Run by test_triton.py in a process of its own, without Triton's interpreter: that one looks at neither types nor memory.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsevit_cli import windows
from sparsevit_cli.kernels import Affine, BlockWeights, Norm, triton_code, triton_windows

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPES |= {torch.int64: "*i64", torch.int32: "*i32"}
COMPUTE_CAPABILITY = 80


class Compiled:
    """Stands for a kernel: instead of launching, compiles it for the arguments of the launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, set[str]()

    def __getitem__(self, grid: object) -> Any:
        return self.compile

    def compile(self, *args: object, num_warps: int = 4, num_stages: int = 3, **constants: object) -> None:
        names = self.kernel.arg_names
        signature = {name: _type(value) for name, value in zip(names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        what = json.dumps([signature, constants, num_warps, num_stages])
        if what in self.seen:
            return
        self.seen.add(what)
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
        pointers = sorted({kind for kind in signature.values() if kind in ("*fp32", "*fp16", "*bf16")})
        told = {"kernel": self.kernel.__name__, "types": pointers, "shared": compiled.metadata.shared}
        print(json.dumps(told), flush=True)


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launch_all(channels: int, dtype: torch.dtype) -> None:
    """Every launch of padded, shifted blocks of V1 and V2, and of scoring and ranking."""

    def affine(inner: int, outer: int) -> Affine:
        return Affine(torch.zeros(outer, inner, dtype=dtype), torch.zeros(outer, dtype=dtype))

    norm = Norm(torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 1e-5)
    heads = channels // 32
    block = BlockWeights(
        norm1=norm, qkv=affine(channels, 3 * channels), proj=affine(channels, channels), norm2=norm,
        fc1=affine(channels, 4 * channels), fc2=affine(4 * channels, channels), num_heads=heads, scale=32**-0.5,
    )  # fmt: skip
    index = windows.window_token_index(20, 20, (7, 7), (3, 3), torch.device("cpu"))
    tokens, bias = torch.zeros(400, channels, dtype=dtype), torch.zeros(4, heads, 49, 49, dtype=dtype)
    bias_class = torch.zeros(len(index), dtype=torch.int64)
    assert triton_windows.supports(block)
    after = block._replace(norm_first=False, scale=1.0, cosine_scale=torch.ones(heads, 1, 1, dtype=dtype))
    many = index.expand(20, *index.shape).flatten(0, 1)  # more than one program compacts
    for one in (block, after):
        for padded in (False, True):
            triton_windows.run_windows_(tokens, many, one, bias, bias_class, padded=padded)
    triton_windows.score_and_rank(tokens.view(1, 20, 20, channels), [index, index], 5, "mean_abs_l2")


if __name__ == "__main__":
    for step in ("count", "compact", "project", "attention", "mlp", "norm_add", "score", "rank"):
        name = f"{step}_kernel"
        setattr(triton_code, name, Compiled(getattr(triton_code, name)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        launch_all(96, dtype)
    launch_all(192, torch.float16)  # the widest that fuses the MLP in 16 bits
    launch_all(384, torch.float32)  # one that does not
