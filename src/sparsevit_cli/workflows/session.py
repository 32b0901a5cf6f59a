"""What every workflow starts from: the configuration, the device, data, and a model with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsevit_cli.backbones import divisor
from sparsevit_cli.config.experiment import ExperimentConfig, Scope
from sparsevit_cli.data.source import Categories, Data, shorten
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.profiling.device import describe_device, describe_versions, resolve_device
from sparsevit_cli.profiling.inputs import model_device, model_dtype, placed, torch_dtype
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.profiling.parts import Parts
from sparsevit_cli.profiling.workload import Workload, image_workload
from sparsevit_cli.ranks import Ranks
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.runs import RunFolder, RunLocks, folder_of, open_run
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.swin import model_depths, sparsify_
from sparsevit_cli.tasks.task import BuildOptions, Task, task_of
from sparsevit_cli.weights import fitted, load_state, with_our_names


@dataclass(frozen=True)
class Weights:
    """Trained weights, with what they must be used with."""

    name: str
    """The command that made them, or their path."""
    state_dict: dict[str, Tensor]
    """By the names in their file; `fitted` gives them those of a model."""
    sha256: str
    categories: Categories = field(default_factory=Categories)
    """In the order of the outputs; none if a file does not say."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """The `metrics.json` of the command that made them."""
    is_best: bool = False
    """True for those of the step with the best validation score, not the last."""

    @property
    def like(self) -> dict[str, Tensor]:
        """What a task may look a shape up in: by the names in the file, and those of its Swin by timm's."""
        return with_our_names(self.state_dict)

    @property
    def told(self) -> str:
        """What to call them."""
        return f"{self.name}, best step" if self.is_best else self.name


@dataclass(frozen=True)
class Session:
    """One command's surroundings."""

    config: ExperimentConfig
    reporter: Reporter
    stop: StopRequest = field(default_factory=StopRequest)
    argv: Sequence[str] = ()
    fresh: bool = False
    locks: RunLocks = field(default_factory=RunLocks)
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together."""

    @cached_property
    def patience(self) -> Patience:
        """How long neighbours are waited for, in all the measurements of the command."""
        return Patience(self.config.clock.wait, self.config.clock.max_neighbour)

    @cached_property
    def task(self) -> Task:
        """What the model is trained for."""
        return task_of(self.config)

    @cached_property
    def device(self) -> torch.device:
        """The device that `config.device` names, or that of this rank."""
        return self.ranks.device or resolve_device(self.config.device)

    @cached_property
    def environment(self) -> dict[str, object]:
        """Device and versions, saved with every result."""
        return {"device": describe_device(self.device), "versions": describe_versions()}

    @property
    def img_size(self) -> Size:
        """Input height and width in pixels."""
        return self.task.image_size

    def folder(self, command: str) -> RunFolder:
        """Open the folder of `command`, and log into it: the first rank does, which holds its lock."""
        return self.ranks.on_first(lambda: self._open(command))

    def _open(self, command: str) -> RunFolder:
        folder = open_run(
            self.config, command, argv=self.argv, environment=self.environment, fresh=self.fresh,
            reporter=self.reporter, locks=self.locks,
        )  # fmt: skip
        log_to = getattr(self.reporter, "log_to", None)
        if log_to is not None:
            log_to(folder.path / "log.txt")
        self.reporter.say(f"{command}: {self.signature} in {folder.path}")
        return folder

    @property
    def signature(self) -> str:
        """Versions and device in one line."""
        versions = describe_versions()
        names = ("sparsevit-cli", "git", "torch", "timm")
        named = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        return f"{named} on {describe_device(self.device).get('name', self.device)}"

    def earlier(self, command: str) -> RunFolder:
        """The folder of another command, without opening it."""
        return RunFolder(folder_of(self.config, command), command, self.argv)

    def data(self, weights: Weights | None = None) -> Data:
        """The data of the experiment; categories are in the order in which `weights` were trained with them."""
        data = self.task.data(seed=self.config.seed, categories=weights.categories if weights else None)
        seed = weights.result.get("seed") if weights is not None else None
        if data.split_seed is not None and seed not in (None, self.config.seed):
            got = f"the weights were trained with seed {seed}, which also splits the data, not {self.config.seed}"
            raise CheckpointError("seed", got, f"Use --seed {seed}: images trained on prove nothing.")
        if weights is not None and weights.categories.names and weights.categories != data.categories:
            got = f"weights of {weights.name} know {_told(weights.categories)}, the data have {_told(data.categories)}"
            raise CheckpointError("categories", got, "Use the data that it was trained on, or another checkpoint.")
        return data

    def model(self, categories: Categories, weights: Weights | None = None) -> nn.Module:
        """A sparse model at ratio 0 with `weights`, or with the configuration's own if there are none.

        Raises ConfigError, and CheckpointError for weights that do not fit.
        """
        like = None if weights is None else weights.like
        options = BuildOptions(self.config.seed, like=like, initial_weights=weights is None, say=self.reporter.say)
        model = self.task.build(categories, options)
        if weights is not None:
            name = f"weights of {weights.name}"
            partition = self.config.model.partition
            fitting = fitted(weights.state_dict, model, name, self.reporter.say, partition=partition)
            load_state(model, fitting, name)
        return self.sparsified_(model).to(self.device)

    @property
    def measuring(self) -> dict[str, Any]:
        """Settings of `measure_interleaved` that are those of the experiment."""
        clock = self.config.clock
        return {"seed": self.config.seed, "retries": clock.retries, "max_spread": clock.max_spread}

    def workload(
        self,
        model: nn.Module,
        size: Size | None = None,
        batch_size: int = 1,
        precision: str | None = None,
        scope: Scope = "model",
    ) -> Workload:
        """A seeded batch of inputs for the task's `model`, or for its backbone alone.

        The whole model gets the task's example inputs, and works at full load. The backbone of a model around a Swin
        gets the example images if those are one tensor, else noise. `size` (height, width) defaults to the
        experiment's. With a `precision` of the configuration what is measured and its inputs are on the session's
        device in that type, float32 for int8, as a copy if it is elsewhere; without one they are as the model is.
        """
        size = size or self.img_size
        if scope == "backbone" and len(self.task.scopes(model)) > 1:
            return self.backbone_workload(self.task.backbone(model), size, batch_size, precision)
        inputs = self.task.example(size, batch_size, seed=self.config.seed)
        if precision is not None:
            model = placed(model, self.device, torch_dtype(precision))
        device, dtype = model_device(model), model_dtype(model)

        def moved(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

        return Workload(model, tree_map(moved, inputs), size, batch_size, loaded=self.task.at_full_load)

    def backbone_workload(
        self, backbone: nn.Module, size: Size, batch_size: int = 1, precision: str | None = None
    ) -> Workload:
        """As `workload`, for a backbone that is there alone; `size` is rounded up to what it takes, as a task pads."""
        step, seed = divisor(backbone), self.config.seed
        height, width = (-(-side // step) * step for side in size)
        example = self.task.example((height, width), batch_size, seed=seed)
        fits = isinstance(example, Tensor) and example.ndim == 4 and example.shape[2:] == (height, width)
        if precision is not None:
            backbone = placed(backbone, self.device, torch_dtype(precision))
        given = example if fits else (height, width)
        return image_workload(backbone, given, batch_size, scope="backbone", seed=seed)

    def parts(self, model: nn.Module) -> Parts:
        """The task's parts of `model`; the backbone alone if the task names none."""
        return self.task.parts(model) or {"backbone": (self.task.backbone(model),)}

    def sparsified_(self, model: nn.Module) -> nn.Module:
        """`sparsify_` with the configuration's importance, kernels and partition."""
        section = self.config.model
        return sparsify_(model, importance=section.importance, kernels=self.config.kernels, partition=section.partition)

    def space(self, model: nn.Module, max_ratio: float) -> SearchSpace:
        """All configurations of `model` up to `max_ratio`."""
        return SearchSpace(model_depths(model), max_ratio)

    def replaced(self, **changes: Any) -> Session:
        """This session with another configuration, reporter or flag; what it has waited counts on."""
        other = replace(self, **changes)
        other.__dict__["patience"] = self.patience  # where cached_property keeps it
        return other


def _told(categories: Categories) -> str:
    names = f"{len(categories)} categories ({shorten(categories.names)})"
    return names if categories.ids is None else f"{names} of ids {shorten(list(map(str, categories.ids)))}"
