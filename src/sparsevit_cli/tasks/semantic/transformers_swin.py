"""A Swin backbone as transformers writes it to files, under the names of a SwinBackbone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = {
    "layernorm_before": "norm1", "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "attention.output.dense": "attn.proj", "attention.self.relative_position_bias_table":
    "attn.relative_position_bias_table",
}  # fmt: skip
"""The longer names first where one ends like another: see `_block_name`."""
_QKV = ("query", "key", "value")


def swin_weights(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' SwinBackbone (the names in files, without prefix) under the names of a SwinBackbone.

    transformers keeps query, key and value apart, and a merging at the end of its stage, timm at the start of the next
    one. The last norm of the Swin itself is left out: what stands on it reads the norms of the levels.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in encoder.items():
        if key.startswith(("swin.layernorm.", "layernorm.")) or key.endswith("relative_position_index"):
            continue
        if norm := re.fullmatch(r"hidden_states_norms\.stage(\d+)\.(\w+)", key):
            found[f"norms.{int(norm[1]) - 1}.{norm[2]}"] = tensor
        elif merging := re.fullmatch(r"encoder\.layers\.(\d+)\.downsample\.(.+)", key):
            found[f"swin.layers.{int(merging[1]) + 1}.downsample.{merging[2]}"] = tensor
        elif block := re.fullmatch(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            if "attention.self." in block[3] and block[3].split(".")[2] in _QKV:
                continue
            found[f"swin.layers.{block[1]}.blocks.{block[2]}.{_block_name(block[3])}"] = tensor
        else:
            found[f"swin.{_stem_name(key)}"] = tensor
    for key in encoder:
        if one := re.fullmatch(r"(encoder\.(layers\.\d+\.blocks\.\d+)\.attention\.self\.)query\.(\w+)", key):
            parts = [encoder[f"{one[1]}{name}.{one[3]}"] for name in _QKV if f"{one[1]}{name}.{one[3]}" in encoder]
            found[f"swin.{one[2]}.attn.qkv.{one[3]}"] = torch.cat(parts)
    return found


def _block_name(name: str) -> str:
    for theirs in sorted(_BLOCK, key=len, reverse=True):
        if name.startswith(theirs):
            return _BLOCK[theirs] + name.removeprefix(theirs)
    return name


def _stem_name(key: str) -> str:
    key = key.removeprefix("embeddings.")
    return re.sub(r"^norm\.", "patch_embed.norm.", key.replace("patch_embeddings.projection.", "patch_embed.proj."))
