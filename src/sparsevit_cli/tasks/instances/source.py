"""Sources of images with objects: the embedded scenes of digits, and image files."""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from sparsevit_cli.data.chosen import ChosenSource
from sparsevit_cli.data.digit_scenes import DigitScenes, Scene
from sparsevit_cli.data.drawn import DrawnSource
from sparsevit_cli.data.images import UnreadableImageError, decode_image, upright_size
from sparsevit_cli.data.source import BadImages, Source
from sparsevit_cli.data.splits import Indices
from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.sizes import Size

from .masks import run_lengths
from .placing import PlacingSpec, Target, frame_of, placed_image, placed_objects, shown_size, stretched
from .truth import Instance, Truth, Truths

Sample = tuple[Tensor, Target]
"""Image (3, H, W) float32, and `boxes`, `labels`, `masks` to learn from, or `truth` and `frame` to be judged by."""


class InstanceSource(Source):
    """Images with objects. `held_out` ones are never augmented, and carry the whole truth at its own size."""

    held_out: bool

    @abstractmethod
    def objects(self, index: int) -> Sample:
        """An image with its objects on the canvas, whatever the split: `boxes`, `labels` and, if asked for, `masks`."""

    def collate(self, samples: Sequence[Sample], seed: int | None) -> tuple[Any, Any]:
        """Images (B, 3, H, W), and the targets as a list; in training each with `draw`, a seed of its own."""
        images = torch.stack([image.as_subclass(Tensor) for image, _ in samples])
        targets = [{name: _plain(value) for name, value in target.items()} for _, target in samples]
        if seed is not None:
            targets = [{**target, "draw": derive_seed(seed, "draw", at)} for at, target in enumerate(targets)]
        return images, targets


def _plain(value: object) -> object:
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


class SceneSource(DrawnSource[DigitScenes], InstanceSource):
    """The embedded scenes of digits."""

    def __init__(self, scenes: DigitScenes, *, masks: bool) -> None:
        super().__init__(scenes)
        self.masks, self.held_out = masks, scenes.split != "train"

    def __getitem__(self, index: int) -> Sample:
        if not self.held_out:
            return self.objects(index)
        scene, placement = self.drawn[index], stretched(self.image_size, self.image_size)
        target: Target = {"truth": scene_truth(scene, index), "frame": frame_of(placement)}
        return tv_tensors.Image(scene.image), target

    def objects(self, index: int) -> Sample:
        scene = self.drawn[index]
        boxes = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=self.image_size)
        target: Target = {"boxes": boxes, "labels": scene.labels + 1}
        if self.masks:
            target["masks"] = tv_tensors.Mask(scene.masks.to(torch.uint8))
        return tv_tensors.Image(scene.image), target

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{'' if self.masks else ', boxes'}"


def scene_truth(scene: Scene, number: int) -> Truth:
    """The digits of a scene as COCO would tell them."""
    instances = []
    for box, label, mask in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks.numpy(), strict=True):
        shape = run_lengths(mask)
        x0, y0, x1, y1 = box
        instances.append(Instance(label, (x0, y0, x1 - x0, y1 - y0), float(shape.area), shape))
    height, width = scene.image.shape[1:]
    return Truth(number, (int(height), int(width)), tuple(instances))


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, listed and not decoded.

    `truths` holds one for each image, `names` the files below `folder`, `faults` why an image cannot be read, as far
    as the listing tells, `digest` what tells one state of the annotations and files from another.
    """

    split: str
    folder: Path
    names: tuple[str, ...]
    truths: Truths
    faults: dict[int, str]
    digest: str
    max_megapixels: float

    def key(self, index: int) -> str:
        """What to call an image."""
        return f"{self.split}/{self.names[index]}"


class FileSource(ChosenSource, InstanceSource):
    """Chosen images from files. Augmentation is a function of (seed, epoch, number), whoever computes it."""

    spec: PlacingSpec

    def __init__(
        self,
        images: Images,
        indices: Indices,
        spec: PlacingSpec,
        *,
        masks: bool,
        seed: int,
        bad_images: BadImages | None,
    ) -> None:
        super().__init__(indices, seed=seed, bad_images=bad_images)
        self.images, self.spec, self.masks, self.held_out = images, spec, masks, spec.augment is None

    def __getitem__(self, index: int) -> Sample:
        if not self.held_out:
            return self.objects(index)
        truth = self._truth(index)
        placement = self.spec.place(truth.size, 0)
        image = placed_image(self._decoded(index), placement, self.spec)
        return tv_tensors.Image(image), {"truth": truth, "frame": frame_of(placement)}

    def objects(self, index: int) -> Sample:
        truth = self._truth(index)
        placement = self.spec.place(truth.size, derive_seed(self.seed, "augment", self.epoch, index))
        image = placed_image(self._decoded(index), placement, self.spec)
        objects = placed_objects(truth, placement, masks=self.masks)
        return tv_tensors.Image(image), {**objects, "frame": frame_of(placement)}

    def collate(self, samples: Sequence[Sample], seed: int | None) -> tuple[Any, Any]:
        """As the others; images that may be smaller than the canvas come as `Padded`."""
        images, targets = super().collate(samples, seed)
        if not self.spec.pads:
            return images, targets
        canvas = int(images.shape[2]), int(images.shape[3])
        return {"images": images, "sizes": [shown_size(target["frame"], canvas) for target in targets]}, targets

    def _truth(self, index: int) -> Truth:
        return self.images.truths[self.record(index)]

    def _decoded(self, index: int) -> Any:
        """The upright image. Raises UnreadableImageError, also if its size is not the one of the annotations."""
        number = self.record(index)
        name = self.images.key(number)
        if number in self.images.faults:
            raise UnreadableImageError(name, self.images.faults[number], "Replace or remove it.")
        image = decode_image(self.images.folder / self.images.names[number], name, self.images.max_megapixels)
        self._refuse_other_size(number, (image.height, image.width))
        return image

    def check_header(self, index: int) -> None:
        """The size of the image is compared with that of its annotations."""
        number, images = self.record(index), self.images
        path = images.folder / images.names[number]
        self._refuse_other_size(number, upright_size(path, images.key(number), images.max_megapixels))

    def _refuse_other_size(self, number: int, size: Size) -> None:
        listed = self.images.truths.size(number)
        if size != listed:
            got = f"it has {size[0]} x {size[1]} pixels, its annotations {listed[0]} x {listed[1]}"
            turned = "; EXIF turns it, and the upright one counts" if size[::-1] == listed else ""
            raise UnreadableImageError(self.images.key(number), got + turned, "Correct one of the two.")

    def sample_name(self, index: int) -> str:
        return self.images.key(self.record(index))

    def sample_file(self, index: int) -> Path | None:
        number = self.record(index)
        return self.images.folder / self.images.names[number]

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{'' if self.masks else ', boxes'}"

    @functools.cached_property
    def listing_digest(self) -> str:
        """SHA-256 over the annotations and the chosen images."""
        digest = hashlib.sha256(self.images.digest.encode())
        for name in sorted(self.images.names[number] for number in self.indices.tolist()):
            digest.update(name.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()
