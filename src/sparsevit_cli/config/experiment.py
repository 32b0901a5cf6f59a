"""The sections that every experiment has, as pydantic models: closed, frozen, every field with a sentence.

What a task adds to them stands in `tasks`, which makes the type of a whole experiment. `docs/configuration.md` is
generated from both (`make docs`); a test compares.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sparsevit_cli.sparsity import SparsityConfig, ratio_to_tenths

from .paths import as_path


def _on_grid(ratio: float) -> float:
    ratio_to_tenths(ratio, where="")
    return ratio


def _never_decreasing(ratios: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    SparsityConfig.from_ratios(ratios)
    return ratios


def _plain_text(text: str) -> str:
    if controls := [c for c in text if unicodedata.category(c) == "Cc"]:
        raise ValueError(f"control character {controls[0]!a} in {ascii(text)[:80]}")
    return text


def _names_a_path(text: str) -> str:
    as_path(text, "")
    return text  # as it was written, because hashes of sections are made of it


FLOAT32_MAX, FLOAT32_TINY = 2.0**128 - 2.0**104, 2.0**-126
"""The largest float32, and the smallest one with all of its digits."""
Text = Annotated[str, AfterValidator(_plain_text)]
PathText = Annotated[Text, AfterValidator(_names_a_path)]
_GRID = {"multipleOf": 0.1}
Ratio = Annotated[float, Field(ge=0, le=0.8, json_schema_extra=_GRID), AfterValidator(_on_grid)]
NonZeroRatio = Annotated[float, Field(ge=0.1, le=0.8, json_schema_extra=_GRID), AfterValidator(_on_grid)]
StageRatios = Annotated[tuple[tuple[Ratio, ...], ...], AfterValidator(_never_decreasing)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=16384)]
Precision = Literal["fp32", "bf16", "fp16"]
TimedPrecision = Literal["fp32", "bf16", "fp16", "int8"]
"""Precisions that a latency may be of; int8 is that of quantised exports."""
RuntimeName = Literal["torch", "onnxruntime", "openvino"]
Contestant = Literal["B0", "B1", "B2", "B2f", "B3", "ours", "O"]
"""Kinds of contestants of `profile --rivals`."""
PRECISIONS_OF: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
"""What each runtime computes in."""
Scope = Literal["model", "backbone"]
"""How much of a task's model a cost stands for: everything, or the backbone alone."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """This section with other values, validated, unlike pydantic's. Raises ValidationError."""
        return self.model_validate({**dict(self), **(update or {})})

    @field_validator("*", mode="after")
    @classmethod
    def _fits_float32(cls, value: object) -> object:
        """Tensors and optimizers are float32: beyond it a number turns into infinity or zero without a word."""
        left = [value]
        while left:
            number = left.pop()
            left += number if isinstance(number, tuple) else ()
            if isinstance(number, float) and number and not FLOAT32_TINY <= abs(number) <= FLOAT32_MAX:
                raise ValueError(
                    f"{number:g} does not fit into float32, which holds 0 and {FLOAT32_TINY:.3g} to {FLOAT32_MAX:.3g}"
                )
        return value


class ModelSection(Section):
    """Which timm Swin, and its weights."""

    name: str = Field(
        "swin_tiny_patch4_window7_224",
        pattern=r"^swin(v2)?_[a-z0-9_]+(\.[a-z0-9_]+)?$",
        description="timm model name, `swin_*`, `swin_s3_*`, `swinv2_*` or `swinv2_cr_*`, with or without a tag.",
    )
    pretrained: bool = Field(False, description="Start from timm's pretrained weights (downloads from the model hub).")
    checkpoint: PathText | None = Field(
        None,
        description="Local weights to start from: safetensors, any file of torch.save, a `.pkl` of detectron2, a "
        "folder of transformers' `save_pretrained`, or a checkpoint folder of ours. Names are timm's, Microsoft's, "
        "transformers', mmdet's or detectron2's. A task with a dense backbone takes a classifier, a backbone, or the "
        "backbone inside a detector.",
    )
    reset_head: bool = Field(False, description="Start with a new classifier where the checkpoint's does not fit.")
    img_size: Side | tuple[Side, Side] = Field(224, description="Input size in pixels: one number or [height, width].")
    in_chans: Count = Field(3, description="Input channels.")
    embed_dim: Count | None = Field(None, description="Channels of the first stage; null keeps the architecture's.")
    depths: tuple[Count, ...] | None = Field(None, description="Blocks per stage; null keeps the architecture's.")
    num_heads: tuple[Count, ...] | None = Field(None, description="Attention heads per stage; null keeps them.")
    window_size: Count | None = Field(None, description="Window side in tokens; null keeps the architecture's.")
    patch_size: Count | None = Field(None, description="Patch side in pixels; null keeps the architecture's.")
    mlp_ratio: Positive | None = Field(None, description="Hidden over input channels of the MLP; null keeps it.")
    global_pool: Literal["avg", "max"] | None = Field(None, description="Pooling before the classifier; null keeps it.")
    drop_path_rate: Fraction | None = Field(None, description="Stochastic depth rate in training; null keeps it.")
    always_partition: bool | None = Field(
        None,
        description="Keep the window size on maps smaller than a window (padded); null keeps timm's shrinking in "
        "classifiers, and is true in backbones that take any size.",
    )
    weight_init: Literal["timm", "jax", "quiet_background"] = Field(
        "timm",
        description="Initial weights: timm's default, its `jax` scheme (Xavier), or its default with flat patches "
        "of mean brightness embedded as zero, so that the first stage's scores tell objects from background at once.",
    )
    importance: Literal["mean_abs_l2", "l2", "random"] = Field(
        "mean_abs_l2",
        description="Score of a window: the released code's, the paper's wording, or a seeded random control.",
    )
    partition: Literal["roll_first", "pad_first"] = Field(
        "roll_first",
        description="What comes first where shifted windows do not divide a map: the roll, as in timm, or the padding, "
        "as in transformers, mmdet, detectron2 and Microsoft's code. Take the one that the weights were trained with.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> ModelSection:
        if self.checkpoint is not None and self.pretrained:
            raise ValueError("checkpoint and pretrained are both set, and only one can give the weights")
        if self.checkpoint is not None and "://" in self.checkpoint:
            raise ValueError(f"checkpoint {self.checkpoint} is an address, not a local path; download it first")
        if self.depths is not None and self.num_heads is not None and len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {list(self.depths)} and num_heads {list(self.num_heads)} differ in their number of stages"
            )
        return self


class BackboneModel(ModelSection):
    """A timm Swin as the backbone of a model."""

    always_partition: bool | None = Field(
        True, description="Keep the window size, and so the shift, on maps smaller than a window; null keeps timm's."
    )


class TaskSection(Section):
    """What the model is trained for."""

    name: str = Field("classification", pattern=r"^[a-z][a-z0-9_]*$", description="Name of the task.")


class DataSection(Section):
    """Where samples come from, and how they are read."""

    source: str = Field("own", pattern=r"^[a-z][a-z0-9_]*$", description="Name of the source.")
    eval_batch_size: Count = Field(64, description="Images per batch in evaluation and search.")
    workers: Annotated[int, Field(ge=0, le=64)] = Field(0, description="Data loading processes; 0 loads in-process.")
    max_wait_seconds: Positive = Field(
        600.0, description="Longest wait for one batch from loader processes, in seconds; above it exit 3."
    )


class Phase(Section):
    """One step of a curriculum of growing images."""

    img_size: Side | tuple[Side, Side] = Field(description="Input size in pixels in this phase, as in model.")
    epochs: Positive = Field(description="Length in epochs.")
    lr: Positive | None = Field(None, description="Peak learning rate of this phase; null takes the section's.")


class LoopSection(Section):
    """What the one training loop needs; adapt, finetune and dense training share it."""

    epochs: Positive = Field(30.0, description="Length in passes over the training split.")
    curriculum: tuple[Phase, ...] = Field(
        (), description="Phases of growing images; empty trains at model.img_size for `epochs`. Replaces `epochs`."
    )
    batch_size: Count = Field(64, description="Images per optimizer step.")
    accumulation: Count = Field(1, description="Micro-batches that a step is split into, to save memory.")
    optimizer: str = Field("adamw", pattern=r"^[a-z0-9_]+$", description="timm optimizer name, lower case.")
    lr: Positive = Field(1e-3, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="Weight decay; none on norms, biases, bias tables."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Learning rate decay per layer.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Linear warm-up, in epochs: at the start, and in phases that begin above the last end.",
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(1e-6, description="Learning rate at the end.")
    clip_grad: Positive | None = Field(1.0, description="Largest gradient norm; null does not clip.")
    precision: Precision = Field(
        "fp32",
        description="fp32, or autocast to bf16 (fp32 on a CPU that emulates it) or fp16 (with a loss scaler).",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of the exponential moving average of the weights; null keeps none."
    )
    eval_every: Positive = Field(1.0, description="Epochs between validations.")
    save_every: Positive = Field(1.0, description="Epochs between checkpoints.")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints kept, besides the best.")
    grad_checkpointing: bool = Field(False, description="Recompute blocks in the backward pass, to save memory.")

    @model_validator(mode="after")
    def _divides(self) -> LoopSection:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}, and the rate would rise to it")
        return self


class TrainSection(LoopSection):
    """Dense training from scratch or from given weights (`sparsevit pretrain`)."""


class AdaptSection(LoopSection):
    """Sparsity-aware adaptation: a new random configuration at every step (`sparsevit adapt`)."""

    epochs: Positive = Field(12.0, description="Length in passes over the training split.")
    lr: Positive = Field(1e-5, description="Peak learning rate (the authors: 1e-5).")
    max_ratio: Ratio = Field(0.8, description="Largest sparsity ratio drawn.")
    check_ratios: tuple[Ratio, ...] = Field((0.3, 0.5, 0.7), description="Uniform ratios of the closing table.")
    check_random: Count = Field(4, description="Random configurations whose mean stands in the closing table.")


class FinetuneSection(LoopSection):
    """Training with the found configuration fixed (`sparsevit finetune`)."""

    epochs: Positive = Field(36.0, description="Length in passes over the training split.")
    lr: Positive = Field(1e-5, description="Peak learning rate.")
    ratios: StageRatios | None = Field(
        None, description="Ratios per stage and block pair; null takes the winner of the search."
    )


class SearchSection(Section):
    """The search for the best sparsity configuration within a budget (`sparsevit search`)."""

    strategy: Literal["surrogate", "evolution", "random", "optuna"] = Field(
        "surrogate",
        description="`surrogate`: a model of the metric over the ratios chooses candidates; `evolution`: the paper's "
        "algorithm; `random`: its control; `optuna`: Optuna's TPE sampler (extra `optuna`).",
    )
    scope: Scope = Field(
        "model",
        description="What budgets and latencies of the search are of: the whole `model`, or, in tasks with modules "
        "around the Swin, its `backbone` alone. In another runtime than torch latencies of a backbone are of backbone "
        "and neck, as an exported file is.",
    )
    budget_latency: Text | None = Field(
        None, description="Latency budget per batch: milliseconds (`50ms`) or share of dense (`70%`)."
    )
    budget_macs: Text | None = Field(
        None, description="Budget of multiply-adds per image: `3G`, `450M` or share of dense (`60%`)."
    )
    population: Annotated[int, Field(ge=2)] = Field(
        100, description="Candidates per generation of `evolution` and `random`."
    )
    parents: Count = Field(25, description="Best candidates that breed, in `evolution`.")
    generations: Annotated[int, Field(ge=1)] = Field(
        20, description="Generations after the first, of `evolution` and `random`."
    )
    mutation: Fraction = Field(0.1, description="Probability that a mutation redraws a gene, in `evolution`.")
    max_evaluations: Count | None = Field(
        None,
        description="Candidates asked for at most, known ones too; null for no limit with `evolution` and `random`, "
        "and for 100 with the others, of which `surrogate` ends earlier where nothing promises a gain.",
    )
    max_ratio: NonZeroRatio = Field(0.8, description="Largest sparsity ratio searched.")
    samples: Count | None = Field(None, description="Fixed subset of the search split for candidates; null for all.")
    racers: Count = Field(
        16,
        description="With `samples`: the best candidates, which race on more and more images until `finalists` are "
        "left or half of the split was seen. No more than `finalists` for no race.",
    )
    finalists: Count = Field(5, description="Best candidates that are scored on the whole split and measured.")
    batch_size: Count = Field(1, description="Images per batch in latency measurements.")
    runtime: Literal["torch", "onnxruntime", "openvino"] = Field(
        "torch",
        description="What runs the model in latency measurements: PyTorch on `device`, or on the CPU a runtime that "
        "takes the exported program. A latency budget is kept there. Candidates are scored in PyTorch.",
    )
    precision: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32",
        description="Precision of the model in latency measurements. openvino takes fp32, bf16 and int8; onnxruntime "
        "fp32 and int8; torch fp32, bf16 and fp16.",
    )
    latency_table: PathText | None = Field(
        None,
        description="A latency table of another machine (`sparsevit profile --latency-table` there): the search keeps "
        "its budget by this table alone, and measures nothing; null measures here.",
    )
    margin: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.02, description="Share of a latency budget kept free for measurement error."
    )
    holdout: Annotated[int, Field(ge=2)] = Field(
        8, description="Random configurations measured to report the latency table's error."
    )
    seconds: Positive = Field(0.3, description="Measuring time per latency table entry, in seconds.")

    @model_validator(mode="after")
    def _parents_fit(self) -> SearchSection:
        if self.parents > self.population:
            raise ValueError(f"parents {self.parents} is above population {self.population}")
        return self

    @model_validator(mode="after")
    def _runtime_computes(self) -> SearchSection:
        if self.precision not in PRECISIONS_OF[self.runtime]:
            raise ValueError(
                f"precision {self.precision} is not for runtime {self.runtime}, which takes "
                f"{' and '.join(PRECISIONS_OF[self.runtime])}"
            )
        return self


class ProfileSection(Section):
    """Dense against sparse on this machine (`sparsevit profile`)."""

    batch_sizes: tuple[Count, ...] = Field((1, 4), min_length=1, description="Images per batch.")
    image_sizes: tuple[Side | tuple[Side, Side], ...] = Field(
        (), description="Input sizes in pixels, numbers or [height, width]; empty takes model.img_size."
    )
    precision: TimedPrecision = Field(
        "fp32",
        description="Precision of the computation. onnxruntime has fp32 and int8, openvino no fp16, torch no int8; "
        "`int8` is of a program that is quantised on random images, for the clock and nothing else. "
        "A runtime without it is left out, which is told.",
    )
    runtimes: Annotated[tuple[RuntimeName, ...], Field(min_length=1)] | None = Field(
        None,
        description="Where models run, in the same rounds and on as many threads; null is torch, and with --rivals on "
        "a CPU all that are installed.",
    )
    mode: Literal["eager", "compile", "graph"] = Field(
        "eager", description="For rows of torch: plain, torch.compile for all, or (on a GPU) a CUDA graph for all."
    )
    ratios: StageRatios | Ratio | None = Field(
        None,
        description="Configuration to profile: per stage and pair, or one number; null takes what finetune trained at, "
        "else the winner.",
    )
    seconds: Positive = Field(3.0, description="Measuring time per row at least, in seconds.")
    rounds: Annotated[int, Field(ge=6)] = Field(30, description="Interleaved rounds at least.")
    max_spread: Positive = Field(0.10, description="Largest accepted interquartile range over median.")
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="CPU threads; null keeps PyTorch's choice. "
        "OMP_NUM_THREADS does the same faster: torch.set_num_threads slows fused attention down.",
    )
    max_autotune: bool = Field(
        False, description="With --rivals, add dense timm in torch.compile's slowest mode; minutes of compiling."
    )
    contestants: tuple[Contestant, ...] = Field(
        ("B0", "B1", "B2", "B2f", "B3", "ours", "O"),
        description="With --rivals, the kinds that are measured: timm as installed (B1), its variants and other "
        "runtimes (B2), compiled and frozen (B2f), smaller images (B3), the authors' flow (B0), ours and its oracles "
        "(O). B1, B2 and ours must be among them.",
    )

    @model_validator(mode="after")
    def _names_are_once(self) -> ProfileSection:
        for name in ("runtimes", "contestants"):
            names = getattr(self, name) or ()
            if len(set(names)) < len(names):
                raise ValueError(f"{name} {list(names)} names one twice")
        if not {"B1", "B2", "ours"} <= set(self.contestants):
            raise ValueError(f"contestants {list(self.contestants)} lacks B1, B2 or ours, so nothing can be compared")
        return self


class ClockSection(Section):
    """When a latency may be relied on: a neighbour's work would be measured too, so it is waited for."""

    wait: Annotated[float, Field(ge=0, le=86400)] = Field(
        60.0,
        description="Seconds that a command waits in all for other processes to leave the CPU, or the GPU, alone; "
        "then what needs the clock ends with exit 8.",
    )
    max_neighbour: Positive | None = Field(
        None,
        description="CPU cores that other processes may take beside a steady measurement; "
        "null is 2 % of all cores, at least 0.05 and at most 0.25. 1 and more accepts other processes on a GPU too.",
    )
    max_spread: Positive = Field(
        0.10,
        description="Largest accepted interquartile range over median in `search` and `run`; `profile` has its own.",
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="Times that a latency whose samples spread too far or drift is measured again."
    )


class RunSection(Section):
    """What the closing table compares with (`sparsevit run`)."""

    dense_baseline: bool = Field(
        False,
        description="Train the dense model on for as many steps as adaptation and finetuning took, on the same images, "
        "and give it a row; the dense rival on smaller images goes on from it. Without it the sparse model had the "
        "longer training.",
    )


class ExportSection(Section):
    """Files for other runtimes, each checked against eager before it is called good (`sparsevit export`)."""

    scope: Literal["auto", "model", "features"] = Field(
        "auto",
        description="The whole model, or its backbone and neck; `auto` takes the whole model when it gives tensors of "
        "fixed number and shape for a batch of images, as classifiers and segmenters do.",
    )
    formats: tuple[Literal["onnx", "pt2", "openvino"], ...] = Field(
        ("onnx", "pt2"),
        description="Formats besides safetensors, sparsity.json and serving.json, which are always written; "
        "`openvino` is a pair of files, xml and bin.",
    )
    precision: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="What a runtime computes in. Files of bf16 hold float32, and OpenVINO is asked to compute in "
        "bfloat16. Files of int8 are quantised by NNCF, and their score is told before and after. Windows are scored "
        "and ranked in float32. bf16 needs `openvino` among the formats and a CPU with bfloat16, int8 `openvino` or "
        "`onnx`.",
    )
    activations: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="What is computed in where the file does not say eight bits; `auto` follows the precision, and for "
        "int8 it is bf16 if the CPU has it, else fp32.",
    )
    opset: Annotated[int, Field(ge=18, le=25)] = Field(20, description="ONNX operator set.")
    check_batch_sizes: tuple[Count, Count] = Field((1, 3), description="Two batch sizes of the check against eager.")
    tolerance: Positive = Field(
        1e-3, description="Largest accepted difference in float32, over the largest eager output."
    )
    latency: bool = Field(
        True,
        description="Measure dense and sparse latency in ONNX Runtime and OpenVINO, in those whose files are written, "
        "and whether the winner's file keeps a latency budget of `search.runtime`.",
    )
    calibration_images: Count = Field(
        128,
        description="With precision int8: images that tell the ranges of activations, a seeded choice of the search "
        "split, which is held out of the training images; fewer where it has fewer.",
    )
    max_loss: Annotated[float, Field(ge=0)] = Field(
        0.5,
        description="With precision int8: points of the metric that eight bits may cost on the validation data. Where "
        "they cost more, the layers that cost most stay in float.",
    )


class ExperimentConfig(Section):
    """One YAML file: an experiment. Its type is made for the task and the source that it names (`tasks`)."""

    experiment: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name of the run folder: at most 64 letters, digits and `_ . -`, a letter or digit first.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Every random draw is a function of it.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="`auto`, `cpu`, `mps`, `cuda` or `cuda:N`."
    )
    kernels: Literal["auto", "portable", "native", "triton"] = Field(
        "auto",
        description="What runs kept windows at inference: `portable` on any device, `native` (C++, compiled at first "
        "use) on a CPU, or `triton` on a GPU, each of them portable, with a warning, where it cannot be taken; `auto` "
        "is native on an x86-64 CPU with AVX2 and a C++ compiler, and portable elsewhere: nothing else was measured.",
    )
    output: PathText = Field("runs", min_length=1, description="Folder of all run folders.")
    task: TaskSection = Field(TaskSection(), description="What the model is trained for.")
    model: ModelSection = Field(ModelSection(), description="Which timm Swin, and its weights.")
    data: DataSection = Field(DataSection(), description="Where samples come from.")
    train: TrainSection = Field(TrainSection(), description="Dense training.")
    adapt: AdaptSection = Field(AdaptSection(), description="Sparsity-aware adaptation.")
    search: SearchSection = Field(SearchSection(), description="Search under a budget.")
    finetune: FinetuneSection = Field(FinetuneSection(), description="Finetuning of the winner.")
    profile: ProfileSection = Field(ProfileSection(), description="Measurement.")
    clock: ClockSection = Field(ClockSection(), description="When a latency may be relied on.")
    export: ExportSection = Field(ExportSection(), description="Files for other runtimes.")
    run: RunSection = Field(RunSection(), description="What the closing table compares with.")

    @model_validator(mode="after")
    def _curricula_end_at_full_size(self) -> ExperimentConfig:
        size = self.model.img_size
        full = (size, size) if isinstance(size, int) else size
        for name, section in (("train", self.train), ("adapt", self.adapt), ("finetune", self.finetune)):
            last = section.curriculum[-1].img_size if section.curriculum else full
            if last not in (full, full[0] if full[0] == full[1] else full):
                raise ValueError(f"{name}.curriculum ends at {last} pixels, model.img_size is {size}")
        return self
