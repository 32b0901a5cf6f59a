"""Sections of data that several tasks share: the embedded digits, and image files. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .experiment import DataSection, Fraction, Positive, Section


class DigitsSection(Section):
    """The embedded data set: scikit-learn's handwritten digits on large cluttered canvases."""

    digit_min: Annotated[int, Field(ge=4)] = Field(16, description="Smallest drawn digit, side in pixels.")
    digit_max: Annotated[int, Field(ge=4)] = Field(24, description="Largest drawn digit, side in pixels.")
    clutter: Fraction = Field(0.5, description="Strength of the background clutter, 0 to 1.")

    @model_validator(mode="after")
    def _ordered(self) -> DigitsSection:
        if self.digit_min > self.digit_max:
            raise ValueError(f"digit_min {self.digit_min} is above digit_max {self.digit_max}")
        return self


class DigitScenesData(DataSection):
    """Scenes of one to five of the embedded digits."""

    source: Literal["digits"] = Field("digits", description="Scenes of embedded digits.")
    digits: DigitsSection = Field(DigitsSection(), description="What is drawn.")


class ImageFiles(DataSection):
    """Images in files."""

    search_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the training images held out for search: never trained on, never validated on."
    )
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="Per-channel mean of normalised images, 0-1.")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="Per-channel deviation of images, 0-1.")
    max_bad_fraction: Fraction = Field(
        0.01, description="Share of unreadable training images tolerated; above it training ends with exit 3."
    )
    max_megapixels: Positive = Field(64.0, description="Largest image accepted, in megapixels, before decoding.")

    @model_validator(mode="after")
    def _mean_and_std_agree(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}")
        return self
