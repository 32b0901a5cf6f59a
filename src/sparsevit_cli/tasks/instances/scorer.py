"""COCO's average precision of boxes and masks, by faster_coco_eval, at the size of the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevit_cli.data.source import Batch, Categories
from sparsevit_cli.errors import NothingToScoreError
from sparsevit_cli.sizes import Size

from .masks import mask_api, pasted
from .model import MASK_SHIFT, Detections
from .truth import Truth

NAMES = {"AP_all": "ap", "AP_50": "ap50", "AP_75": "ap75", "AP_small": "ap_small", "AP_medium": "ap_medium",
         "AP_large": "ap_large"}  # fmt: skip
"""faster_coco_eval's names, and ours after `box_` or `mask_`."""


class AveragePrecision:
    """Detections and truths of the batches so far, as COCO writes them; category ids are those of the file."""

    def __init__(self, categories: Categories, *, masks: bool) -> None:
        self.names, self.masks = categories.names, masks
        self.ids = categories.ids or tuple(range(1, len(categories) + 1))
        self.truths: list[Truth] = []
        self.detections: list[dict[str, Any]] = []
        """COCO's results: image_id, category_id, bbox, score, and segmentation as compressed run lengths."""

    def update(self, outputs: Detections, batch: Batch) -> None:
        """Detections of a batch whose targets hold `truth` and `frame`, where the image lies on the canvas (1, 4)."""
        for found, target in zip(outputs, batch.targets, strict=True):
            self.truths.append(target["truth"])
            self.detections += self._results(found, target["truth"], target["frame"][0].cpu())

    def add(self, other: AveragePrecision) -> None:
        """Take in the images of another one."""
        self.truths += other.truths
        self.detections += other.detections

    def _results(self, found: Mapping[str, Tensor], truth: Truth, frame: Tensor) -> list[dict[str, Any]]:
        boxes, scores, labels = (found[name].detach().cpu() for name in ("boxes", "scores", "labels"))
        in_image = on_image(boxes.double(), frame.double(), truth.size)
        height, width = truth.size
        limits = torch.tensor([width, height, width, height], dtype=in_image.dtype)
        clipped = in_image.clamp(min=0).minimum(limits)
        sides = clipped[:, 2:] - clipped[:, :2]
        rows = torch.cat([clipped[:, :2], sides], dim=1).tolist()
        results = [
            {"image_id": truth.image_id, "category_id": self.ids[int(label) - 1], "bbox": row, "score": float(score)}
            for row, label, score in zip(rows, labels, scores, strict=True)
        ]
        if self.masks:
            api, of_masks = mask_api(), on_image(boxes.double() + MASK_SHIFT, frame.double(), truth.size)
            for result, mask, box in zip(results, found["masks"].float().cpu(), of_masks.tolist(), strict=True):
                pixels = pasted(mask[0], box, truth.size)
                result["segmentation"] = api.encode(np.asfortranarray(pixels.astype(np.uint8)))
        return [result for result, side in zip(results, sides.tolist(), strict=True) if min(side) > 0]

    def compute(self) -> Mapping[str, float]:
        """AP in percent under `mask_ap`, `box_ap` and the like; without those of sizes that no object has.

        Raises NothingToScoreError if there is no object at all.
        """
        if not any(not instance.crowd for truth in self.truths for instance in truth.instances):
            got = f"none of {len(self.truths)} images holds an object, so there is no AP"
            raise NothingToScoreError(
                "data: evaluation images", got, "Evaluate on more images, or correct the annotations."
            )
        kinds = ("segm", "bbox") if self.masks else ("bbox",)
        return {name: value for kind in kinds for name, value in self._computed(kind).items()}

    def _computed(self, kind: str) -> dict[str, float]:
        mask_api()  # tells what is missing
        from faster_coco_eval import COCO, COCOeval_faster

        truth, found = COCO(self._truth()), COCO(self._found(kind))
        evaluation = COCOeval_faster(truth, found, kind, print_function=_silent, rle_iou_max_workers=1)
        evaluation.run()
        prefix = {"segm": "mask", "bbox": "box"}[kind]
        stats = evaluation.stats_as_dict
        return {f"{prefix}_{ours}": 100 * stats[name] for name, ours in NAMES.items() if stats[name] >= 0}

    def predictions(self) -> list[dict[str, Any]]:
        """The detections as COCO's results files have them."""
        return [
            {name: _as_text(value) if name == "segmentation" else value for name, value in row.items()}
            for row in self.detections
        ]

    def _truth(self) -> dict[str, Any]:
        """The truth so far, as an annotation file holds it, but for ids."""
        rows = [
            {
                "image_id": truth.image_id, "category_id": self.ids[instance.label], "bbox": list(instance.box),
                "area": instance.area, "iscrowd": int(instance.crowd),
                **({} if instance.shape is None else {"segmentation": instance.shape.coco(truth.size)}),
            }
            for truth in self.truths
            for instance in truth.instances
        ]  # fmt: skip
        return self._numbered(rows)

    def _found(self, kind: str) -> dict[str, Any]:
        """The detections with the areas that COCO gives them: of the box, or of the mask."""
        if kind == "bbox":
            rows = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in self.detections]
        else:
            api = mask_api()
            rows = [{**row, "area": float(api.area(row["segmentation"])), "iscrowd": 0} for row in self.detections]
        return self._numbered(rows)

    def _numbered(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The document of `rows` with small ids in the order of the file's: faster_coco_eval reads ids as doubles.

        The order matters: of detections with one score, those of the image with the lower id come first. Ids begin at
        1, since 0 would mean that nothing is matched.
        """
        images, categories = _ranks(truth.image_id for truth in self.truths), _ranks(self.ids)
        return {
            "images": [{"id": images[t.image_id], "height": t.size[0], "width": t.size[1]} for t in self.truths],
            "categories": [{"id": categories[n], "name": name} for n, name in zip(self.ids, self.names, strict=True)],
            "annotations": [
                {
                    **row, "id": number,
                    "image_id": images[row["image_id"]], "category_id": categories[row["category_id"]],
                }
                for number, row in enumerate(rows, 1)
            ],
        }  # fmt: skip


def on_image(boxes: Tensor, frame: Tensor, size: Size) -> Tensor:
    """Boxes (n, 4) on the canvas as boxes on the image of `size`, which lies in `frame` (4,) of the canvas."""
    height, width = size
    scale = torch.tensor([width, height], dtype=boxes.dtype) / (frame[2:] - frame[:2])
    return (boxes - frame[:2].repeat(2)) * scale.repeat(2)


def _ranks(ids: Iterable[int]) -> dict[int, int]:
    """1 for the lowest id, 2 for the next one, and so on."""
    return {number: rank for rank, number in enumerate(sorted(set(ids)), 1)}


def _as_text(run_lengths: Mapping[str, Any]) -> dict[str, Any]:
    """Compressed run lengths whose counts are text, as JSON holds them."""
    counts = run_lengths["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": list(run_lengths["size"]), "counts": text}


def _silent(*text: object) -> None:
    """What is evaluated is told by the command."""
