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
from typing import Any

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
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError, ConfigError, in_one_line, pass_on
from sparsevit_cli.profiling.device import describe_versions
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity, sparse_stages, sparsify_
from sparsevit_cli.swin.geometry import window_sizes
from sparsevit_cli.windows import IMPORTANCES, PARTITIONS, Importance, Partition

MANIFEST, WEIGHTS, SPARSITY = "manifest.json", "model.safetensors", "sparsity.json"
FILES = {"onnx": "model.onnx", "pt2": "model.pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORMAT_VERSION = 3
"""Version 1 calls the categories `class_names`. Versions 1 and 2 name no partition: theirs is `roll_first`."""
_ONNX_DATA = "model.onnx.data"
NAMES = (*FILES.values(), _ONNX_DATA, WEIGHTS, SPARSITY)
_BUILD_ARGS = (
    "img_size in_chans num_classes embed_dim depths num_heads head_dim window_size patch_size mlp_ratio qkv_bias "
    "global_pool drop_rate drop_path_rate strict_img_size always_partition features_only out_indices"
)  # what a sparsity.json may hand to timm: nothing that downloads, or loads a pickle
_AGAIN = "Export the model again."


@dataclass(frozen=True)
class ModelInfo:
    """What sparsity.json tells about the model besides its weights; all of it optional.

    `name` and `args` build it with timm.create_model; `mean` and `std` normalise images in 0-1, per channel.
    """

    name: str | None = None
    args: Mapping[str, object] = field(default_factory=dict)
    categories: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


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


def load_sparsity(path: Path | str) -> SparsityFile:
    """Read a sparsity.json, or the one of an export folder. Raises CheckpointError."""
    path = Path(path)
    path = path / SPARSITY if os.path.isdir(path) else path
    parsed = read_json(path, _AGAIN)
    with understood(path, _AGAIN):
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
        return SparsityFile(
            sparsity=SparsityConfig.from_ratios(parsed["ratios"], depths),
            depths=depths,
            importance=parsed["importance"],
            img_size=(height, width),
            model=ModelInfo(
                name=model["name"],
                args={key: tuple(arg) if isinstance(arg, list) else arg for key, arg in model["args"].items()},
                **{key: None if model[key] is None else tuple(model[key]) for key in ("categories", "mean", "std")},
            ),
            versions=dict(parsed["versions"]),
            windows=tuple((int(height), int(width)) for height, width in parsed.get("windows", ())),
            partition=partition,
        )


def load_exported(directory: Path | str) -> nn.Module:
    """Build the model of an export folder with timm, load its weights and set its ratios; in evaluation mode.

    The weights are checked against the manifest. Raises CheckpointError where a file is missing, damaged or does
    not fit, or where the export was made without the model's name.
    """
    import timm

    directory = Path(directory)
    _verify(directory, (WEIGHTS, SPARSITY))
    saved = load_sparsity(directory)
    if saved.model.name is None:
        raise CheckpointError(
            str(directory / SPARSITY), "holds no model name", "Build the model, then load its weights."
        )
    strange = sorted(set(saved.model.args) - set(_BUILD_ARGS.split()))
    if strange or not saved.model.name.startswith(("swin_", "swinv2_")):
        got = f"asks timm for {saved.model.name!r} with {strange or 'known arguments'}"
        raise CheckpointError(str(directory / SPARSITY), got, "Build the model yourself, then load its weights.")
    try:
        args = {"img_size": saved.img_size, **saved.model.args}
        if saved.windows and saved.model.name.startswith("swinv2_"):  # no weight of theirs tells the window
            args["window_size"] = saved.windows
        model: nn.Module = timm.create_model(saved.model.name, pretrained=False, **args)
        model.load_state_dict(safetensors.torch.load_file(directory / WEIGHTS))
    except Exception as error:
        pass_on(error)
        got = f"does not load into {saved.model.name} ({in_one_line(error)})"
        raise CheckpointError(str(directory / WEIGHTS), got, _AGAIN) from error
    with understood(directory / SPARSITY, _AGAIN):
        set_sparsity(sparsify_(model, importance=saved.importance, partition=saved.partition), saved.sparsity)
    return model.eval()


def check_info(info: ModelInfo) -> None:
    """Raise ConfigError where `info` does not fit into JSON."""
    try:
        json.dumps(asdict(info), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "export info", f"does not fit into JSON ({error})", "Give plain numbers and texts."
        ) from error


def sparsity_json(model: nn.Module, shape: tuple[int, int, int], info: ModelInfo) -> dict[str, object]:
    """Content of sparsity.json for images of `shape` (C, H, W)."""
    return {
        "format": FORMAT_VERSION,
        "ratios": get_sparsity(model).ratios,
        "depths": model_depths(model),
        "importance": sparse_stages(model)[0].importance,
        "partition": sparse_stages(model)[0].partition,
        "img_size": shape[1:],
        "windows": list(window_sizes(model)),
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


def _verify(directory: Path, names: Sequence[str]) -> None:
    """Compare files with the manifest's hashes. Raises CheckpointError."""
    manifest = read_json(directory / MANIFEST, _AGAIN)
    for name in names:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", _AGAIN)
        try:
            expected = manifest["files"][name]["sha256"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(str(directory / MANIFEST), f"does not list {name}", _AGAIN) from error
        try:
            found = sha256_file(path)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read ({error})", _AGAIN) from error
        if found != expected:
            got = "has another SHA-256 than the manifest says: its content changed"
            raise CheckpointError(str(path), got, _AGAIN)


def _size_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
