"""timm's three generations of Swin: V1 (`swin_*`, `swin_s3_*`), V2 (`swinv2_*`) and V2-CR (`swinv2_cr_*`).

They share the shape that sparsity needs: stages with `blocks` and `downsample`, blocks with `window_size`,
`shift_size`, `attn` and `mlp` on maps (B, H, W, C). V1 normalises before attention and MLP. V2 and V2-CR normalise
after, attend by cosine and compute their position bias with a small network; V2-CR passes maps (B, C, H, W) between
stages, and may normalise the whole map after a block.
"""

from __future__ import annotations

from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models import swin_transformer_v2_cr as v2cr

__all__ = ["GENERATIONS", "STAGES", "Block", "Stage", "v1", "v2", "v2cr"]

Stage = v1.SwinTransformerStage | v2.SwinTransformerV2Stage | v2cr.SwinTransformerV2CrStage
Block = v1.SwinTransformerBlock | v2.SwinTransformerV2Block | v2cr.SwinTransformerV2CrBlock
STAGES = (v1.SwinTransformerStage, v2.SwinTransformerV2Stage, v2cr.SwinTransformerV2CrStage)
GENERATIONS = {"V1": "swin_transformer", "V2": "swin_transformer_v2", "V2-CR": "swin_transformer_v2_cr"}
"""Generation -> timm's module, as timm.list_models(module=...) takes it."""
