"""Programs whose keep counts are inputs, the table that is made of them, and a search that spends its budget there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.exporting import UntraceableError
from sparsevit_cli.exporting.adjustable import AdjustablePrograms, Counts
from sparsevit_cli.exporting.images import structured_images
from sparsevit_cli.exporting.light import timed_file
from sparsevit_cli.exporting.programs import OPSET, save_onnx, trace
from sparsevit_cli.exporting.quantization import quantised_layers
from sparsevit_cli.profiling.program_table import AT_ONCE, measure_program_table, measure_programs
from sparsevit_cli.runtimes import RUNTIMES
from sparsevit_cli.runtimes.openvino import load_openvino
from sparsevit_cli.search.latency_table import LatencyTable, TableError
from sparsevit_cli.search.table_design import TableDesign
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.windows import num_keep
from tiny import tiny_swin

WINDOWS, PAIRS = (16, 4, 9, 1), (1, 1, 3, 1)
SPACE = SearchSpace((2, 2, 6, 2))
MOVED = (4.0, 2.0, 1.0, 0.5)
KEPT = tuple(tuple(num_keep(count, t) for t in range(9)) for count in WINDOWS)
DESIGN, COMPACT = TableDesign(KEPT, PAIRS, MOVED, own_dense=True), TableDesign(KEPT, PAIRS, MOVED)
SCORING_MS, MOVES_MS, WINDOW_MS, REST_MS = (1.0, 0.8, 0.6, 0.4), 0.5, (0.1, 0.3, 1.2, 4.0), 7.0


def cost_ms(config: SparsityConfig) -> float:
    """Made up: scoring once per pruned stage, windows that are kept, gathers of pairs that skip some."""
    total = REST_MS
    for stage, count in enumerate(WINDOWS):
        kept = [num_keep(count, tenths) for tenths in config.tenths[stage]]
        total += SCORING_MS[stage] * (min(kept) < count)
        total += sum(WINDOW_MS[stage] * number + MOVES_MS * (number < count) for number in kept)
    return total


class FakeTime:
    """A clock in nanoseconds that programs move."""

    def __init__(self) -> None:
        self.now_ns, self.loaded = 0, 0

    def clock(self) -> int:
        return self.now_ns

    def load(self, config: SparsityConfig) -> Callable[[], object]:
        self.loaded += 1

        def run() -> None:
            self.now_ns += round(cost_ms(config) * 1e6)

        return run


# -- arithmetic ---------------------------------------------------------------------------------------------------


def test_a_table_of_whole_programs_predicts_additive_costs_exactly() -> None:
    fake = FakeTime()
    table = measure_program_table(fake.load, DESIGN, {"runtime": "made up"}, seconds=1e-6, clock=fake.clock)
    assert fake.loaded == len(DESIGN.configs())
    for config in [SPACE.dense, SPACE.sparsest, *(SPACE.sample(Random(n)) for n in range(40))]:
        assert table.predict(config) == pytest.approx(cost_ms(config), rel=1e-6)
    assert table.overhead_ms[2] == pytest.approx(SCORING_MS[2], rel=1e-4)
    assert len(set(table.pair_ms[1][0])) == 4, "ratios that keep equally many windows share one entry"
    assert len(set(table.pair_ms[3][0])) == 1, "a single window is always computed"
    assert table.identity == {"runtime": "made up"}


def test_a_table_of_two_patterns_shares_out_what_dense_stages_save() -> None:
    """Where moves cost by their bytes, the dense program tells them of all stages at once."""

    def moving_ms(config: SparsityConfig) -> float:
        stages = enumerate(zip(config.tenths, WINDOWS, strict=True))
        kept = [(stage, num_keep(count, tenths), count) for stage, (pairs, count) in stages for tenths in pairs]
        return REST_MS + sum(WINDOW_MS[s] * number + 0.1 * MOVED[s] * (number < count) for s, number, count in kept)

    configs = COMPACT.configs()
    assert len(configs) == 2 + 7 + 2 + 7, "one window has no ratio, four windows have four counts"
    sparse = [[min(stage) > 0 for stage in config.tenths] for config in configs]
    assert sum(not all(stages) for stages in sparse) == 1, "dense alone is of another pattern"
    table = COMPACT.table({config: moving_ms(config) for config in configs}, {})
    for config in [SPACE.dense, SPACE.sparsest, *(SPACE.sample(Random(n)) for n in range(40))]:
        assert table.predict(config) == pytest.approx(moving_ms(config), rel=1e-6)


def test_a_stage_of_two_counts_is_measured_dense() -> None:
    """One pruned ratio makes no line to prolong."""
    kept = tuple(tuple(num_keep(count, t) for t in range(9)) for count in (16, 2))
    design = TableDesign(kept, (1, 1), (2.0, 1.0))
    dense_second = SparsityConfig(((8,), (0,)))
    assert dense_second in design.configs()

    def ms(config: SparsityConfig) -> float:
        return 5 + sum(num_keep(count, tenths) for count, (tenths,) in zip((16, 2), config.tenths, strict=True))

    table = design.table({config: ms(config) for config in design.configs()}, {})
    assert all(table.predict(c) == pytest.approx(ms(c)) for c in SearchSpace((2, 2)))


def test_programs_are_measured_a_few_at_a_time_beside_the_first() -> None:
    fake, shares, alive = FakeTime(), [], []

    def load(config: SparsityConfig) -> Callable[[], object]:
        alive.append(config)
        return fake.load(config)

    configs = list(dict.fromkeys(SPACE.sample(Random(n)) for n in range(2 * AT_ONCE + 1)))
    found = measure_programs(load, configs, seconds=1e-6, rounds=6, clock=fake.clock, on_share=shares.append)
    assert list(found) == alive == configs, "each is loaded once"
    assert shares == [AT_ONCE / (2 * AT_ONCE), 1.0]
    for config, latency in found.items():
        assert latency.median_ms == pytest.approx(cost_ms(config))
        assert latency.speedup == pytest.approx(cost_ms(configs[0]) / cost_ms(config))


def test_noise_never_makes_ranking_cheaper_than_nothing() -> None:
    """A negative overhead would make the search prefer to prune one pair a little."""
    rng = Random(1)
    measured = {config: cost_ms(config) * (1 + 0.3 * rng.random()) for config in DESIGN.configs()}
    assert all(ms >= 0 for ms in DESIGN.table(measured, {}).overhead_ms)


# -- a table of another machine -----------------------------------------------------------------------------------

IDENTITY = {
    "runtime": "openvino", "precision": "int8", "activations": "bf16", "batch": 1, "image_size": [672, 672],
    "depths": [2, 2, 6, 2],
}  # fmt: skip
HERE = {"device": {"name": "an EPYC"}, "runtime_version": "2026.4", "torch": "2.15"}


def table_of(identity: dict[str, Any]) -> LatencyTable:
    return replace(DESIGN.table({config: cost_ms(config) for config in DESIGN.configs()}, identity))


def test_a_table_of_another_machine_serves_the_same_model_and_settings() -> None:
    table = table_of({**IDENTITY, **HERE})
    table.check_identity({**IDENTITY, "device": {"name": "a Xeon"}}, any_machine=True)
    with pytest.raises(CheckpointError, match=r"device .*an EPYC.* there"):
        table.check_identity({**IDENTITY, "device": {"name": "a Xeon"}})
    for field, value in {
        "batch": 4,
        "activations": "fp32",
        "precision": "fp32",
        "depths": [2, 2],
        "image_size": [1, 1],
    }.items():
        with pytest.raises(CheckpointError, match=f"{field} .* there, .* here"):
            table.check_identity({**IDENTITY, field: value}, any_machine=True)
    with pytest.raises(CheckpointError, match="runtime 'openvino' there, 'torch' here"):
        table.check_identity({key: value for key, value in IDENTITY.items() if key != "runtime"}, any_machine=True)


def test_the_error_of_a_table_is_kept_with_it_and_tables_of_before_have_none() -> None:
    table = replace(table_of(IDENTITY), error=TableError(0.01, 0.02, 8))
    assert LatencyTable.from_json(table.to_json()) == table
    document = json.loads(table_of(IDENTITY).to_json())
    del document["table"]["error"]
    from sparsevit_cli.search.latency_table import _checksum

    document["sha256"] = _checksum(document["table"])
    assert LatencyTable.from_json(json.dumps(document)).error is None


# -- programs -----------------------------------------------------------------------------------------------------

SIDE = 112


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Maps of 28 and 14 tokens a side: 16 and 4 windows."""
    return sparsify_(tiny_swin(img_size=SIDE, depths=(2, 4), embed_dim=8).eval())


@pytest.fixture(scope="module")
def programs(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> AdjustablePrograms:
    pytest.importorskip("onnxruntime")
    images = structured_images((3, SIDE, SIDE), 2, seed=0)
    return AdjustablePrograms(model, images, (16, 4), RUNTIMES["onnxruntime"], tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_one_file_gives_what_eager_gives_at_all_ratios_of_a_pattern(
    programs: AdjustablePrograms, model: nn.Module, name: str
) -> None:
    pytest.importorskip(name)
    for ratios in ([[0.8], [0.8, 0.8]], [[0.1], [0.3, 0.7]], [[0.5], [0.5, 0.5]], [[0.0], [0.0, 0.6]]):
        config = SparsityConfig.from_ratios(ratios)
        set_sparsity(model, config)
        with torch.no_grad():
            expected = model(programs.images)
        file, lengths = programs.file_of(programs.counts.pattern(config)), programs.counts.lengths(config)
        program = RUNTIMES[name].load(file, shape=programs.images.shape, lengths=lengths)
        (found,) = program.run(programs.images)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())), ratios
    set_sparsity(model, 0.0)
    assert len(list(programs.folder.glob("*.onnx"))) == 2, "one for each pattern"


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_one_quantisation_serves_all_ratios_of_a_pattern(name: str, model: nn.Module, tmp_path: Path) -> None:
    """Counts stay free in a file of eight bits. What it gives stays near eager, and it rounds what an export does."""
    pytest.importorskip("nncf")
    images = structured_images((3, SIDE, SIDE), 1, seed=0)
    programs = AdjustablePrograms(model, images, (16, 4), RUNTIMES[name], tmp_path, eight_bits=True)
    for ratios in ([[0.8], [0.8, 0.8]], [[0.1], [0.3, 0.7]]):
        config = SparsityConfig.from_ratios(ratios)
        set_sparsity(model, config)
        with torch.no_grad():
            expected = model(images)
        (found,) = programs.load(config).run(images)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.2, ratios
    (file,) = programs._files.values()
    assert [each.name for each in tmp_path.iterdir() if each.suffix in (".xml", ".onnx")].count(file.name) == 1
    openvino = load_openvino()
    made = openvino.Core().read_model(file)
    assert [each.get_any_name() for each in made.inputs][1:] == ["keep_0_0", "keep_1_0", "keep_1_1"]
    exported = tmp_path / "export"
    exported.mkdir()
    save_onnx(trace(model, (3, SIDE, SIDE), ()), exported / "model.onnx", ["output"], OPSET, {})
    whole = timed_file(exported / "model.onnx", name, (1, 3, SIDE, SIDE), eight_bits=True)
    layers, wanted = (quantised_layers(each) for each in (made, openvino.Core().read_model(whole)))
    assert len(layers) == len(wanted) > 10
    set_sparsity(model, 0.0)


def test_pt2_programs_take_lengths_too(tmp_path: Path) -> None:
    class Times(nn.Module):
        def forward(self, images: Tensor, keep: Tensor) -> Tensor:
            return images * keep.shape[0]

    images, path = torch.rand(1, 3, 8, 8), tmp_path / "program.pt2"
    given = (images, torch.zeros(4, dtype=torch.uint8))
    length = torch.export.Dim("keep", min=1, max=8)
    torch.export.save(torch.export.export(Times(), given, dynamic_shapes=(None, {0: length})), path)
    (found,) = RUNTIMES["torch"].load(path, lengths={"keep": 5}).run(images)
    assert torch.equal(found, 5 * images)


def test_lengths_are_of_pairs_that_skip_windows() -> None:
    counts = Counts((16, 4, 1))
    config = SparsityConfig.from_ratios([[0.5], [0.0, 0.3], [0.8]])
    assert counts.pattern(config) == ((True,), (False, True), (False,))
    assert counts.lengths(config) == {"keep_0_0": 8, "keep_1_1": 2}


def test_a_detector_has_no_program(tmp_path: Path) -> None:
    class Detector(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
            return [{"boxes": scores} for scores in self.body(images)]

    body = sparsify_(tiny_swin(img_size=SIDE, depths=(2, 2), embed_dim=8).eval())
    with pytest.raises(UntraceableError, match="answers each image"):
        AdjustablePrograms(Detector(body), torch.zeros(1, 3, SIDE, SIDE), (16, 4), RUNTIMES["onnxruntime"], tmp_path)
