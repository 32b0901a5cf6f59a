"""What a profile measures: a model at a configuration and at image sizes, built with random weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.data.source import Categories
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sizes import Size, as_pair
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths
from sparsevit_cli.tasks.task import BuildOptions

from .ratios import ratios_to_profile
from .session import Session


@dataclass(frozen=True)
class ProfileTarget:
    """What is measured: a model at a configuration, at image sizes (height, width) in pixels."""

    session: Session
    sizes: tuple[Size, ...]
    config: SparsityConfig


def profile_target(
    session: Session, *, model: str | None = None, img_size: str | None = None, ratios: str | None = None
) -> ProfileTarget:
    """The configuration's profile with the flags as typed. Raises ConfigError, CheckpointError."""
    if model is not None:
        session = session.replaced(config=_config_of(model, session.config))
    sizes = configured_sizes(session) if img_size is None else parse_sizes(img_size)
    depths = model_depths(built(session, sizes[0]))
    return ProfileTarget(session, sizes, ratios_to_profile(session, depths, ratios, named=model is not None))


def configured_sizes(session: Session) -> tuple[Size, ...]:
    """Image sizes of a profile whose flags name none."""
    return tuple(map(as_pair, session.config.profile.image_sizes)) or (session.img_size,)


def _config_of(name: str, config: ExperimentConfig) -> ExperimentConfig:
    """An experiment of timm's model of that name. Nothing is trained: what `config` says of it fits another model."""
    try:
        trainings = {each: type(getattr(config, each))() for each in ("train", "adapt", "finetune")}
        model = type(config.model)(name=name)
        return config.model_copy(update={"experiment": name, "model": model, **trainings})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["loc"] == ("name",):
            raise ConfigError("--model", f"{name!r} is no timm Swin", "Type: sparsevit models") from error
        got = f"{name} cannot be configured by its name alone ({'.'.join(map(str, fault['loc']))}: {fault['msg']})"
        raise ConfigError("--model", got, "Profile the configuration's own model instead.") from error


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`672`, `256x704` (height x width) or a list of them with commas. Raises ConfigError."""
    sizes = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", part)
        if match is None or "0" in (match[1], match[2]):
            raise ConfigError("--img-size", f"{part!r} is no size in pixels", "Write 672, 256x704 or 448,672.")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(sizes)


def built(session: Session, size: Size) -> nn.Module:
    """The configuration's dense timm model at an image size, with random weights, in evaluation mode."""
    folders = [session.earlier(name) for name in ("pretrain", "adapt")]
    results = [(found, folder.result) for folder in folders if (found := folder.read_result())]
    known = Categories.from_saved(results[0][0], str(results[0][1])) if results else None
    return session.task.build(known or None, BuildOptions(img_size=size, initial_weights=False)).eval()


def tell_of_timm(session: Session, command: str) -> None:
    """One line if timm's rows are not of the same numbers as ours."""
    if session.config.model.partition != "roll_first":
        session.reporter.say(
            f"{command}: rows called timm are timm as it is, which rolls before it pads; model.partition is "
            f"{session.config.model.partition}. Their latency compares with ours, their outputs differ"
        )


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """PyTorch on `count` CPU threads inside the block; with None nothing is touched.

    torch.set_num_threads, even with the number there is, makes MKL's products inside parallel loops slower from then
    on (it turns MKL's dynamic threads off), and fused attention consists of such products.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
