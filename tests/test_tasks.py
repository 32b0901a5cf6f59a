"""The task seam: a task from outside the package, batches of any shape, mixup of odd batches, shrunk sources."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as V
from typer.testing import CliRunner

from sparsevit_cli.cli import app
from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.data import Batch, Categories, Shrunk, Source
from sparsevit_cli.data.shrunk import Scale, shrunk_mask
from sparsevit_cli.errors import CheckpointError, ConfigError, NonFiniteError
from sparsevit_cli.evaluation import evaluate
from sparsevit_cli.exporting import load_exported
from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.sizes import ImageSize
from sparsevit_cli.tasks.task import Metric, Task, load_task, task_of
from tiny import tiny_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "blob_counting.py"
SHORT = [
    *("experiment=blobs", "model.img_size=32", "model.embed_dim=8", "model.num_heads=[1,2]", "model.window_size=2"),
    *("train.epochs=0.5", "adapt.epochs=0.2", "finetune.epochs=0.2", "search.max_evaluations=8"),
    *("profile.seconds=0.02", "profile.rounds=6", "profile.max_spread=100.0"),
    *("clock.wait=0", "clock.max_neighbour=1000.0", "clock.max_spread=1000.0", 'export.formats=["pt2"]'),
    "export.latency=false",
]


def typed(folder: Path, *words: str) -> list[str]:
    sets = [word for setting in SHORT for word in ("--set", setting)]
    return [*words, "--task", f"{EXAMPLE}:BlobCounting", "--config", str(EXAMPLE.with_suffix(".yaml")),
            "--output", str(folder), *sets]  # fmt: skip


@pytest.mark.usefixtures("known_kinds")
def test_a_task_from_outside_goes_from_nothing_to_a_finetuned_sparse_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, typed(tmp_path, "run", "--json"))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["task"], document["metric"], document["per"]) == ("blob_counting", "right", "image")
    assert document["rows"][-1]["label"] == "winner, finetuned"
    assert document["rows"][-1]["gmacs"] < document["rows"][0]["gmacs"]
    folder = tmp_path / "blobs"
    assert load_exported(folder / "export")(torch.zeros(1, 3, 32, 32)).shape == (1, 1)
    assert (folder / "search" / "history.csv").read_text().startswith("ratios,right,cost")
    assert "metric: right" in (folder / "search" / "winner.yaml").read_text()
    header = (folder / "pretrain" / "results.csv").read_text().splitlines()[0]
    assert header.endswith("right,val_distance")
    assert json.loads((folder / "finetune" / "metrics.json").read_text())["categories"]["names"] == []
    again = CliRunner().invoke(app, typed(tmp_path, "run", "--json"))
    assert again.exit_code == 0
    assert json.loads(again.stdout)["rows"][-1]["score"] == document["rows"][-1]["score"]


def test_the_example_is_short_and_imports_nothing_private() -> None:
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) < 60
    assert not any("import _" in line or "._" in line.replace("self._", "") for line in lines)


@pytest.mark.usefixtures("known_kinds")
@pytest.mark.parametrize(
    ("text", "content", "told"),
    [
        ("blobs.py", None, "is no task"),
        ("blobs.py:", None, "is no task"),
        ("absent.py:Blobs", None, "there is no file"),
        ("blobs.py:Absent", "", "has no class Absent"),
        ("random.py:Blobs", "", "has the name of another module"),
        ("my-task.py:Blobs", "", "has the name of another module, or none that Python can import"),
        ("blobs.py:Blobs", "Blobs = 3", "has no class Blobs"),
        ("blobs.py:Blobs", "import absent_package", "cannot be run (ModuleNotFoundError"),
        ("blobs.py:Blobs", "def (", "cannot be run (SyntaxError"),
        ("blobs.py:Blobs", "from sparsevit_cli.tasks.task import Task\nclass Blobs(Task): pass", "lacks name, metric"),
    ],
)
def test_what_is_no_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: str | None, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / text.partition(":")[0]).write_text(content)
    with pytest.raises(ConfigError) as refused:
        load_task(text)
    assert told in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.usefixtures("known_kinds")
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_samples_of_a_task_from_outside_reach_us_from_loader_processes(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_task(f"{EXAMPLE}:BlobCounting")
    task = kinds.task_class("blob_counting")(load_config(EXAMPLE.with_suffix(".yaml"), ["task.name=blob_counting"]))
    source = task.data(seed=0, categories=None).train.resized(16)
    context = multiprocessing.get_context(start)
    with context.Pool(1) as pool:
        image, blobs = pool.apply(source.__getitem__, (3,))
    assert (image.shape, float(blobs)) == ((3, 16, 16), 3.0)


@pytest.mark.usefixtures("known_kinds")
def test_a_task_cannot_take_the_name_of_another(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace('"blob_counting"', '"classification"')
    (tmp_path / "blobs.py").write_text(text)
    with pytest.raises(ConfigError, match="is taken"):
        load_task(f"{tmp_path}/blobs.py:BlobCounting")


@pytest.mark.usefixtures("known_kinds")
def test_a_configuration_names_no_code(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path / "blob.py")
    path = tmp_path / "x.yaml"
    path.write_text(f"task: {{name: '{tmp_path}/blob.py:BlobCounting'}}")
    with pytest.raises(ConfigError, match="there is no task"):
        load_config(path)


class _EntryPoint:
    name = "blob_counting"

    def load(self) -> Any:
        load_task(f"{EXAMPLE}:BlobCounting")
        return kinds.task_class("blob_counting")


@pytest.mark.usefixtures("known_kinds")
def test_an_installed_package_offers_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "entry_points", lambda group: [_EntryPoint()] if group == kinds.ENTRY_POINTS else [])
    config = load_config(EXAMPLE.with_suffix(".yaml"), ["task.name=blob_counting"])
    assert type(task_of(config)).__name__ == "BlobCounting"
    assert not hasattr(config.train, "mixup"), "settings of another task"


def leaves(count: int) -> dict[str, Any]:
    return {
        "images": torch.arange(count * 2.0).view(count, 2),
        "boxes": [torch.full((number, 4), float(number)) for number in range(count)],
        "both": (torch.arange(count), torch.arange(count) * 10),
    }


@given(count=st.integers(1, 9), size=st.integers(1, 10))
def test_parts_of_a_batch_hold_every_sample_once_and_in_order(count: int, size: int) -> None:
    batch = Batch(leaves(count), [f"target {number}" for number in range(count)], torch.arange(count))
    parts = list(batch.parts(size))
    assert [len(part) for part in parts] == [min(size, count - first) for first in range(0, count, size)]
    assert torch.equal(torch.cat([part.inputs["images"] for part in parts]), batch.inputs["images"])
    assert [len(box) for part in parts for box in part.inputs["boxes"]] == list(range(count))
    assert torch.equal(torch.cat([part.inputs["both"][1] for part in parts]), batch.inputs["both"][1])
    assert [target for part in parts for target in part.targets] == batch.targets


def test_a_batch_tells_which_samples_are_not_finite() -> None:
    inputs = leaves(4)
    inputs["boxes"][2][0, 0] = float("nan")
    assert Batch(inputs, [0] * 4, torch.arange(4)).is_finite().tolist() == [True, True, False, True]


class Ramps(Source):
    """Images of one number each, with a box."""

    image_size = (32, 48)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        box = tv_tensors.BoundingBoxes([[8.0, 4.0, 16.0, 12.0]], format="XYXY", canvas_size=self.image_size)  # type: ignore[call-overload]
        return torch.linspace(0, index, 3 * 32 * 48).view(3, 32, 48), box

    def resized(self, size: ImageSize) -> Ramps:
        return self

    def fingerprint(self) -> str:
        return "ramps"


def test_a_shrunk_source_shows_the_same_images_and_their_truth_smaller() -> None:
    shrunk = Shrunk(Ramps(), Scale((32, 48), (16, 24), unit=8))
    image, box = shrunk[3]
    assert shrunk.image_size == (16, 24)
    assert box.tolist() == [[4.0, 2.0, 8.0, 6.0]]
    expected = F.interpolate(Ramps()[3][0][None], (16, 24), mode="bilinear", antialias=True)[0]
    assert torch.equal(image, expected)
    assert shrunk.fingerprint() != Ramps().fingerprint()
    assert Scale((32, 48), (16, 24), unit=8)((64, 96)) == (32, 48)


class Strokes(Ramps):
    """A bright square and a bright stroke, with the mask of each (2, H, W) and the classes 0, 3 and 7 (H, W)."""

    image_size = (192, 192)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        masks = torch.zeros(2, 192, 192, dtype=torch.uint8)
        masks[0, 31 : 31 + 42, 20 + index : 62 + index] = 1
        masks[1, 100:180, 101 + index : 106 + index] = 1
        image = masks.amax(0).float().expand(3, -1, -1)
        return tv_tensors.Image(image), tv_tensors.Mask(masks), tv_tensors.Mask(masks[0] * 3 + masks[1] * 7)


def overlap(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("side", [160, 144, 128, 96])
def test_a_shrunk_mask_lies_where_its_image_shows_it(side: int) -> None:
    shrunk = Shrunk(Strokes(), Scale((192, 192), (side, side)))
    for index in range(4):
        image, masks, classes = shrunk[index]
        assert isinstance(masks, tv_tensors.Mask)
        assert (masks.dtype, masks.shape, classes.shape) == (torch.uint8, (2, side, side), (side, side))
        bright = image[0] >= 0.5
        assert overlap(bright, masks.any(0)) > 0.97
        assert overlap(bright, classes > 0) > 0.97
        assert classes.unique().tolist() == [0, 3, 7]
    nothing = shrunk_mask(torch.zeros(0, 192, 192, dtype=torch.uint8), (side, side))
    assert nothing.shape == (0, side, side)


def test_masks_of_objects_are_shrunk_one_at_a_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack at once would take four bytes for each of its pixels, several times over."""
    resized, masks = [], torch.zeros(20, 48, 48, dtype=torch.uint8)
    for number in range(20):
        masks[number, number : number + 9, 4 : 9 + number] = 1
    resize = V.resize
    monkeypatch.setattr(V, "resize", lambda image, *rest, **more: resized.append(image) or resize(image, *rest, **more))
    found = shrunk_mask(masks, (24, 36))
    assert [tuple(image.shape) for image in resized] == [(1, 48, 48)] * 20
    at_once = F.interpolate(masks[:, None].float(), (24, 36), mode="bilinear", antialias=True)[:, 0] >= 0.5
    assert torch.equal(found.as_subclass(Tensor).bool(), at_once)


def test_a_crack_does_not_vanish_from_a_shrunk_stack_and_classes_go_by_area() -> None:
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[0, 41] = 1
    masks[1, 8:88, 8:88] = 1
    crack, broad = shrunk_mask(masks, (24, 24)).as_subclass(Tensor)
    assert crack.sum(0).tolist() == [1] * 24
    assert broad.sum() == 20 * 20
    assert not shrunk_mask(masks[0], (24, 24)).any(), "of a map of classes each pixel gets what has most of it"


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("fields", [{"mixup": 0.4}, {"cutmix": 0.7}, {"mixup": 0.4, "cutmix": 0.7}])
def test_mixup_keeps_every_image_of_an_odd_batch(count: int, fields: dict[str, float]) -> None:
    config = tiny_config(train={"label_smoothing": 0.1, **fields})
    task = task_of(config)
    data = task.data(seed=0, categories=None)
    source = task.training_source(data, config.train)
    assert task.training_source(data, config.adapt) is data.train
    samples = [data.train[index] for index in range(count)]
    images, targets = source.collate(samples, derive_seed(0, "collate", 0, 0))
    assert len(images) == len(targets) == count
    assert torch.allclose(targets.sum(1), torch.ones(count))
    again = source.collate(samples, derive_seed(0, "collate", 0, 0))
    assert torch.equal(images, again[0])
    assert torch.equal(targets, again[1])
    if count % 2:
        assert torch.equal(images[-1], samples[-1][0]), "nobody is left to mix it with"
        assert int(targets[-1].argmax()) == samples[-1][1]
    assert source.resized(48)[0][0].shape[-1] == 48


class Weighed(Task):
    """Losses that are means over what counts: one pixel of the first image, two of the second, and so on."""

    name = "weighed"
    metric = Metric("right", "right")

    def data(self, *, seed: int, categories: Categories | None) -> Any:
        raise NotImplementedError

    def build(self, categories: Any, options: Any) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch, section: LoopSection, teacher: Any) -> Mapping[str, Tensor]:
        values, counts = model(batch.inputs).squeeze(1), batch.targets
        return {"loss": (values * counts).sum() / counts.sum(), "other": (2 * values * counts).sum() / counts.sum()}

    def weight(self, batch: Batch) -> float:
        return float(batch.targets.sum())

    def scorer(self, source: Source, device: torch.device) -> Any:
        class Broken:
            def update(self, outputs: Tensor, batch: Batch) -> None:
                pass

            def compute(self) -> dict[str, float]:
                return {"right": float("nan")}

        return Broken()


def test_weights_make_micro_batches_equal_to_the_whole_batch() -> None:
    """As `training._backward` adds them up."""
    task, model = Weighed(tiny_config()), nn.Linear(3, 1)
    batch = Batch(torch.randn(6, 3), torch.tensor([1.0, 2, 3, 0, 5, 1]), torch.arange(6))

    def gradient(size: int) -> Tensor:
        model.zero_grad()
        for part in batch.parts(size):
            losses = task.loss(model, part, LoopSection(), None)
            (sum(losses.values()) * (task.weight(part) / task.weight(batch))).backward()  # type: ignore[union-attr]
        assert model.weight.grad is not None
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient(2), gradient(6))
    torch.testing.assert_close(gradient(4), gradient(6))


def test_a_score_that_is_no_number_is_told_by_its_name() -> None:
    with pytest.raises(NonFiniteError, match="right over 5 images is nan"):
        evaluate(Weighed(tiny_config()), nn.Flatten(), Ramps2(), batch_size=2, device=torch.device("cpu"))


class Ramps2(Ramps):
    """Without boxes, which have no batch."""

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return super().__getitem__(index)[0], index


@pytest.mark.parametrize("document", [{"class_names": ["a", "b"]}, {"categories": {"names": ["a", "b"], "ids": None}}])
def test_categories_are_read_as_they_were_saved_before_and_now(document: dict[str, Any]) -> None:
    found = Categories.from_saved(document, "x")
    assert found == Categories(("a", "b"))
    assert Categories.from_saved({"categories": Categories(("a",), (7,)).saved()}, "x").ids == (7,)
    assert Categories.from_saved({}, "x") == Categories()


@pytest.mark.parametrize("wrong", [{"categories": 3}, {"categories": {"ids": [1]}}, {"class_names": {"names": 1}}])
def test_categories_that_are_none_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="its categories are"):
        Categories.from_saved(wrong, "x")


class Around(nn.Module):
    """A Swin inside something else, which takes its images in a dict."""

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin, self.answer = swin, nn.Linear(16, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.answer(self.swin(inputs["image"]))  # type: ignore[no-any-return]


WRAPPED = """
import torch
from test_tasks import Around
from sparsevit_cli.data import Categories, Data, Source
from sparsevit_cli.tasks.task import Metric, Task

class Few(Source):
    image_size = (32, 32)
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, index):
        if index >= self.count: raise IndexError(index)
        return {"image": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))}, float(index % 2)
    def resized(self, size): return self
    def fingerprint(self): return f"few {self.count}"

class Wrapped(Task):
    name, metric = "wrapped", Metric("closeness", "closeness", unit="")
    names = ("even", "odd")
    def data(self, *, seed, categories):
        return Data(Few(32), Few(8), Few(12), Categories(self.names, (3, 7)))
    def build(self, categories, options): return Around(self.swin(0, options))
    def loss(self, model, batch, section, teacher):
        return {"distance": (model(batch.inputs).squeeze(1) - batch.targets.float()).square().mean()}
    def example(self, size, batch_size, *, seed=0): return {"image": super().example(size, batch_size, seed=seed)}
    def scorer(self, source, device):
        class Scorer:
            found = []
            def update(self, outputs, batch): self.found.append(float(outputs.sum()))
            def compute(self): return {"closeness": sum(self.found)}
        return Scorer()
"""


@pytest.mark.usefixtures("known_kinds")
def test_a_model_around_a_swin_with_inputs_of_its_own_runs_through(tmp_path: Path) -> None:
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    words = ["--task", f"{tmp_path}/wrapped.py:Wrapped", "--output", str(tmp_path)]
    sets = [*SHORT, "model.depths=[2,2]", "model.always_partition=true", "train.batch_size=8", "adapt.batch_size=8",
            "finetune.batch_size=8", "train.grad_checkpointing=true", "search.budget_macs=70%"]  # fmt: skip
    words += [word for setting in sets for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "--json", *words])
    assert result.exit_code == 0, result.output
    assert "names no `features`: its Swin is exported" in result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert rows[-1]["gmacs"] < rows[0]["gmacs"]
    swin = load_exported(tmp_path / "blobs" / "export")
    assert swin(torch.zeros(1, 3, 32, 32)).shape == (1, 16)
    whole = CliRunner().invoke(app, ["export", *words, "--set", "export.scope=model"])
    assert whole.exit_code == 2
    assert "takes a dict" in whole.stderr
    (tmp_path / "wrapped.py").write_text(WRAPPED.replace("(3, 7)", "(3, 8)"))
    other = CliRunner().invoke(app, ["evaluate", *words])
    assert other.exit_code == 4
    assert "of ids 3, 7" in other.stderr
    twice = CliRunner().invoke(app, ["evaluate", *words, "--set", "task.name=classification"])
    assert (twice.exit_code, "names a task too" in twice.stderr) == (2, True)


class _Foreign:
    name = "foreign"

    def __init__(self, found: Any) -> None:
        self.found = found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.usefixtures("known_kinds")
@pytest.mark.parametrize("found", [ImportError("gone"), Weighed, object])
def test_a_package_that_offers_no_task_is_told(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "entry_points", lambda group: [_Foreign(found)])
    with pytest.raises(ConfigError, match="the package that offers 'foreign'"):
        load_config(EXAMPLE.with_suffix(".yaml"), ["task.name=foreign"])


def test_a_scorer_without_its_metric_is_told() -> None:
    class Forgetful(Weighed):
        metric = Metric("left", "left")

    with pytest.raises(ConfigError, match="its metric is left"):
        evaluate(Forgetful(tiny_config()), nn.Flatten(), Ramps2(), batch_size=2, device=torch.device("cpu"))
