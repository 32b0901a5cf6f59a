"""The folder that an export leaves: its names, the files that tell of it, and how it comes into place at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
from torch import nn

from sparsevit_cli.atomic import (
    TEMPORARY,
    disk_errors,
    failpoint,
    remove_leftovers,
    sha256_file,
    sync,
    sync_folder,
)
from sparsevit_cli.backbones import LEVELS, SwinBackbone, SwinFPN
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError, ConfigError, in_one_line, pass_on
from sparsevit_cli.profiling.device import describe_versions
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity, sparse_stages, sparsify_
from sparsevit_cli.swin.geometry import window_sizes
from sparsevit_cli.windows import IMPORTANCES, PARTITIONS, Importance, Partition

ExportScope = Literal["model", "features"]
"""What the programs of a folder compute: the whole model, or its backbone and neck."""
SUFFIXES = {"onnx": "onnx", "pt2": "pt2", "openvino": "xml"}
"""What the file of a format ends in; OpenVINO keeps its weights beside it, in a `.bin`."""
FORMATS = tuple(SUFFIXES)
DEFAULT_FORMATS = ("onnx", "pt2")
MANIFEST, SPARSITY, SERVING = "manifest.json", "sparsity.json", "serving.json"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORMAT_VERSION = 3
"""Version 1 calls the categories `class_names`. Versions 1 and 2 know whole timm models alone, and no partition but
`roll_first`."""


def file_name(scope: ExportScope, kind: str) -> str:
    """`features.onnx`; `kind` is what the name ends in: one of `_KINDS`."""
    return f"{scope}.{kind}"


def output_prefix(scope: ExportScope) -> str:
    """How the names of outputs begin: `level_0`, `output`."""
    return "level" if scope == "features" else "output"


_KINDS = (*SUFFIXES.values(), "bin", "onnx.data", "safetensors")
"""`bin` holds the weights of OpenVINO's `xml`, `onnx.data` those of large ONNX models, `safetensors` all of them."""
WEIGHTS, FEATURE_WEIGHTS = (file_name(scope, "safetensors") for scope in get_args(ExportScope))
NAMES = (
    *(file_name(scope, kind) for scope in get_args(ExportScope) for kind in _KINDS),
    SPARSITY,
    SERVING,
)
_BUILD_ARGS = (
    "img_size in_chans num_classes embed_dim depths num_heads head_dim window_size patch_size mlp_ratio qkv_bias "
    "global_pool drop_rate drop_path_rate strict_img_size always_partition features_only out_indices"
)  # what a sparsity.json may hand to timm: nothing that downloads, or loads a pickle
AGAIN = "Export the model again."


@dataclass(frozen=True)
class ModelInfo:
    """What sparsity.json tells about the model besides its weights; all of it optional.

    `name` and `args` build its Swin with timm.create_model; `mean` and `std` normalise images in 0-1, per channel.
    `task` is the name of the task that it was trained for.
    """

    name: str | None = None
    args: Mapping[str, object] = field(default_factory=dict)
    task: str | None = None
    categories: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] | None = None
    """The numbers that the data's files use for them; None counts from 0."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModuleInfo:
    """The class that was exported, and what builds it around a Swin if it is one of ours; `levels` are stages."""

    name: str = ""
    levels: tuple[int, ...] = LEVELS
    out_channels: int = 0
    pool: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ModuleInfo:
        """That of a module."""
        if isinstance(module, SwinFPN):
            return cls("SwinFPN", module.body.levels, module.out_channels, module.pool)
        if isinstance(module, SwinBackbone):
            return cls("SwinBackbone", module.levels)
        return cls(type(module).__name__)

    @property
    def is_ours(self) -> bool:
        """True if `built` knows the class."""
        return self.name in ("SwinBackbone", "SwinFPN")

    def built(self, swin: nn.Module) -> nn.Module:
        """The module around a timm Swin; another class than ours is the Swin itself. Raises ConfigError."""
        if not self.is_ours:
            return swin
        body = SwinBackbone(swin, self.levels)
        return body if self.name == "SwinBackbone" else SwinFPN(body, self.out_channels, pool=self.pool)


@dataclass(frozen=True)
class SparsityFile:
    """Content of a sparsity.json. `img_size` is (H, W) in pixels."""

    sparsity: SparsityConfig
    depths: tuple[int, ...]
    importance: Importance
    img_size: tuple[int, int]
    model: ModelInfo
    versions: Mapping[str, str]
    windows: tuple[tuple[int, int], ...] = ()
    """Of each stage, (height, width) in tokens; empty in files of before 2026-11-22."""
    partition: Partition = "roll_first"
    scope: ExportScope = "model"
    module: ModuleInfo = ModuleInfo()


def load_sparsity(path: Path | str) -> SparsityFile:
    """Read a sparsity.json, or the one of an export folder. Raises CheckpointError."""
    path = Path(path)
    path = path / SPARSITY if os.path.isdir(path) else path
    return _read(path, read_json(path, AGAIN))


def _read(path: Path, parsed: Any) -> SparsityFile:
    with understood(path, AGAIN):
        if parsed["format"] not in (1, 2, FORMAT_VERSION):
            got = f"format {parsed['format']!r}, this version reads 1 to {FORMAT_VERSION}"
            raise CheckpointError(str(path), got, "Read it with the version of sparsevit-cli that wrote it.")
        depths = tuple(int(depth) for depth in parsed["depths"])
        height, width = (int(side) for side in parsed["img_size"])
        if parsed["importance"] not in IMPORTANCES:
            raise ValueError(f"importance {parsed['importance']!r}")
        partition: Any = parsed["partition"] if parsed["format"] == FORMAT_VERSION else "roll_first"
        if partition not in PARTITIONS:
            raise ValueError(f"partition {partition!r}")
        model = parsed["model"]
        if parsed["format"] == 1:
            model["categories"] = model.pop("class_names")
        if not isinstance(model["name"], (str, type(None))):
            raise TypeError(f"a model named {model['name']!r}")
        scope, module = parsed.get("scope", "model"), parsed.get("module", {})
        if scope not in get_args(ExportScope):
            raise ValueError(f"scope {scope!r}")
        return SparsityFile(
            sparsity=SparsityConfig.from_ratios(parsed["ratios"], depths),
            depths=depths,
            importance=parsed["importance"],
            img_size=(height, width),
            model=ModelInfo(
                name=model["name"],
                args={key: tuple(arg) if isinstance(arg, list) else arg for key, arg in model["args"].items()},
                task=model.get("task"),
                category_ids=tuple(model["category_ids"]) if model.get("category_ids") else None,
                **{key: None if model[key] is None else tuple(model[key]) for key in ("categories", "mean", "std")},
            ),
            versions=dict(parsed["versions"]),
            windows=tuple((int(height), int(width)) for height, width in parsed.get("windows", ())),
            partition=partition,
            scope=scope,
            module=ModuleInfo(**{**module, "levels": tuple(module.get("levels", LEVELS))}),
        )


def load_exported(directory: Path | str) -> nn.Module:
    """Build what an export folder holds, load its weights and set its ratios; in evaluation mode.

    That is timm's model, or the `SwinBackbone` or `SwinFPN` of a detector or segmenter. The weights are checked against
    the manifest. Raises CheckpointError where a file is missing, damaged or does not fit, where the export was made
    without the model's name, or where only the code of a task can build the module.
    """
    directory = Path(directory)
    verify(directory, (SPARSITY,))
    saved = load_sparsity(directory)
    weights = file_name(saved.scope, "safetensors")
    verify(directory, (weights,))
    if saved.model.name is None:
        of_task = f" of task {saved.model.task}" if saved.model.task else ""
        got = f"holds no model name: what was exported is a {saved.module.name or 'model'}{of_task}"
        do = f"Build the model with its own code, then load {weights} and set the ratios."
        raise CheckpointError(str(directory / SPARSITY), got, do)
    strange = sorted(set(saved.model.args) - set(_BUILD_ARGS.split()))
    if strange or not saved.model.name.startswith(("swin_", "swinv2_")):
        got = f"asks timm for {saved.model.name!r} with {strange or 'known arguments'}"
        raise CheckpointError(str(directory / SPARSITY), got, "Build the model yourself, then load its weights.")
    try:
        model = _built(saved)
        model.load_state_dict(safetensors.torch.load_file(directory / weights))
    except Exception as error:
        pass_on(error)
        got = f"does not load into {saved.model.name} ({in_one_line(error)})"
        raise CheckpointError(str(directory / weights), got, AGAIN) from error
    with understood(directory / SPARSITY, AGAIN):
        set_sparsity(sparsify_(model, importance=saved.importance, partition=saved.partition), saved.sparsity)
    return model.eval()


def _built(saved: SparsityFile) -> nn.Module:
    """The dense module that a sparsity.json tells of, with weights of its own. Raises whatever timm raises."""
    import timm

    args = {"img_size": saved.img_size, **saved.model.args}
    if saved.windows and str(saved.model.name).startswith("swinv2_"):  # no weight of theirs tells the window
        args["window_size"] = saved.windows
    return saved.module.built(timm.create_model(saved.model.name, pretrained=False, **args))


def builds(model: nn.Module, contents: Mapping[str, object]) -> bool:
    """True if `load_exported` can build `model` from the contents of a sparsity.json: parts and their shapes agree."""
    saved = _read(Path(SPARSITY), json.loads(json.dumps(contents)))
    if saved.model.name is None:
        return False
    try:
        other = _built(saved)
    except Exception as error:  # timm checks nothing before it builds
        pass_on(error)
        return False
    shapes, found = ([(name, tensor.shape) for name, tensor in m.state_dict().items()] for m in (model, other))
    return shapes == found and window_sizes(model) == window_sizes(other)


def check_info(info: ModelInfo) -> None:
    """Raise ConfigError where `info` does not fit into JSON."""
    try:
        json.dumps(asdict(info), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "export info", f"does not fit into JSON ({error})", "Give plain numbers and texts."
        ) from error


def sparsity_json(
    model: nn.Module, shape: tuple[int, int, int], info: ModelInfo, scope: ExportScope = "model"
) -> dict[str, object]:
    """Content of sparsity.json for images of `shape` (C, H, W) that enter the exported `model`."""
    return {
        "format": FORMAT_VERSION,
        "ratios": get_sparsity(model).ratios,
        "depths": model_depths(model),
        "importance": sparse_stages(model)[0].importance,
        "partition": sparse_stages(model)[0].partition,
        "img_size": shape[1:],
        "windows": list(window_sizes(model)),
        "scope": scope,
        "module": asdict(ModuleInfo.of(model)),
        "model": asdict(info),
        "versions": export_versions(),
    }


def export_versions() -> dict[str, str]:
    """Versions of all that takes part in an export."""
    versions = describe_versions()
    for package in (*PACKAGES, "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@contextlib.contextmanager
def staging_folder(directory: Path, model: nn.Module) -> Iterator[Path]:
    """A hidden folder inside `directory`, removed at the end; so is `directory` where nothing came into it."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(str(directory), "is a file", "Choose another output folder.")
    blocked = [name for name in (*NAMES, MANIFEST) if (directory / name).is_dir()]
    if blocked:
        raise ConfigError(str(directory / blocked[0]), "is a folder", "Choose another output folder.")
    staging = directory / f"{TEMPORARY}export-{secrets.token_hex(8)}"
    new_folders = [folder for folder in (directory, *directory.absolute().parents) if not folder.exists()]
    with disk_errors(directory, 3 * _size_bytes(model)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory)
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in new_folders:
                    folder.rmdir()


def describe_files(folder: Path) -> dict[str, dict[str, object]]:
    """SHA-256 and bytes of the files of an export that are in `folder`, by name."""
    paths = {name: folder / name for name in _present(folder)}
    return {name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for name, path in paths.items()}


def _present(folder: Path) -> list[str]:
    """Names of an export's files that are in `folder`, the manifest left out."""
    return [name for name in NAMES if (folder / name).exists()]


def publish(staging: Path, directory: Path, reporter: Reporter) -> None:
    """Move the good files into place, the manifest last; remove programs of an earlier export that is now replaced."""
    names = _present(staging)
    for name in names:
        with (staging / name).open("rb") as file:
            sync(file.fileno())
    failpoint("export.before_publish")
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in NAMES:
        if name in names:
            (staging / name).replace(directory / name)
            failpoint("export.mid_publish")
        elif (directory / name).exists():
            (directory / name).unlink()
            reporter.say(f"export: removed {directory / name}, which an earlier export wrote")
    (staging / MANIFEST).replace(directory / MANIFEST)
    sync_folder(directory)


def verify(directory: Path, names: Sequence[str]) -> None:
    """Compare files with the manifest's hashes. Raises CheckpointError for those that are missing or damaged."""
    manifest = read_json(directory / MANIFEST, AGAIN)
    for name in names:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", AGAIN)
        try:
            expected = manifest["files"][name]["sha256"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(str(directory / MANIFEST), f"does not list {name}", AGAIN) from error
        try:
            found = sha256_file(path)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read ({error})", AGAIN) from error
        if found != expected:
            got = "has another SHA-256 than the manifest says: its content changed"
            raise CheckpointError(str(path), got, AGAIN)


def _size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
