"""The additive latency model: arithmetic, calibration, files."""

from __future__ import annotations

import json
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.search import LatencyTable
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

SPACE = SearchSpace((2, 2, 6, 2))
IDENTITY = {"device": "cpu X", "batch": 4, "image_size": (672, 672), "dtype": "fp32", "versions": {"torch": "2.15"}}


def table(max_tenths: int = 8) -> LatencyTable:
    pair_ms = tuple(
        tuple(tuple((4 - stage + pair / 7) * (1 - t / 11) for t in range(max_tenths + 1)) for pair in range(pairs))
        for stage, pairs in enumerate(SPACE.pairs)
    )
    return LatencyTable(3.3, pair_ms, (0.4, 0.3, 0.2, 0.1), IDENTITY)


def test_a_prediction_is_base_plus_pairs_plus_overhead_of_pruned_stages():
    t = table()
    config = SparsityConfig(((3,), (0,), (0, 2, 2), (8,)))
    parts = [t.pair_ms[0][0][3], t.pair_ms[1][0][0], t.pair_ms[2][0][0], t.pair_ms[2][1][2], t.pair_ms[2][2][2]]
    assert t.predict(config) == pytest.approx(3.3 + sum(parts) + t.pair_ms[3][0][8] + 0.4 + 0.2 + 0.1)
    assert t.predict(SPACE.dense) == pytest.approx(3.3 + sum(pair[0] for stage in t.pair_ms for pair in stage))


def test_configurations_outside_the_table_are_refused():
    with pytest.raises(ConfigError, match=r"block pairs \[1, 1\], the model \[1, 1, 3, 1\]"):
        table().predict(SearchSpace((2, 2)).dense)
    with pytest.raises(ConfigError, match=r"ratios above 0\.5"):
        table(max_tenths=5).predict(SPACE.sparsest)


def test_plateaus_are_ratios_of_a_stage_that_are_no_faster():
    """Stage 0 has steps by noise, stage 1 saves as much everywhere, stage 2 nothing, and ranking eats a step of 3."""
    waves = (10, 9, 8.99, 9.01, 7, 5, 5, 5.02, 2)
    even = (9, 8, 7, 6, 5, 4, 3, 2, 1)
    found = LatencyTable(1, ((waves,), (even,), ((3,) * 9, (2,) * 9), (even,)), (0, 0, 0, 1), IDENTITY)
    assert found.plateaus == (((0.1, 0.3), (0.5, 0.7)), (), ((0.0, 0.8),), ((0.0, 0.1),))
    told = "stage 0: 0.1 to 0.3, 0.5 to 0.7; stage 2: 0 to 0.8; stage 3: 0 to 0.1"
    assert found.plateaus_told == f"by the latency table a higher ratio is no faster: {told}"
    slower = LatencyTable(1, ((even,),), (3,), IDENTITY)
    assert slower.predict(SparsityConfig(((1,),))) > slower.predict(SparsityConfig(((0,),)))
    assert slower.plateaus_told.endswith("a higher ratio is no faster: stage 0: 0 to 0.1"), "not equally fast"
    assert LatencyTable(1, ((even,),), (0,), IDENTITY).plateaus_told == ""
    assert LatencyTable(1, (((3,),),), (0,), IDENTITY).plateaus == ((),)


def test_fit_error_is_relative():
    t = table()
    measured = [(SPACE.dense, t.predict(SPACE.dense) / 1.1), (SPACE.sparsest, t.predict(SPACE.sparsest))]
    error = t.fit_error(measured)
    assert (error.mean, error.largest, error.n) == (pytest.approx(0.05), pytest.approx(0.1), 2)
    for bad in ([], [(SPACE.dense, 0.0)], [(SPACE.dense, float("nan"))]):
        with pytest.raises(MeasurementError):
            t.fit_error(bad)


@given(st.floats(0.3, 3), st.floats(-1, 5), st.integers(0, 99))
def test_calibration_removes_scale_and_offset(scale, offset, seed):
    rng = Random(seed)
    configs = [SPACE.sample(rng) for _ in range(12)]
    measured = [(config, scale * table().predict(config) + offset) for config in configs]
    calibrated = table().calibrated(measured)
    held_out = [SPACE.sample(rng) for _ in range(20)]
    for config in held_out:
        assert calibrated.predict(config) == pytest.approx(scale * table().predict(config) + offset, rel=1e-6)
    assert calibrated.identity == table().identity


def test_calibration_never_fits_worse_than_it_found():
    rng = Random(7)
    measured = [(c, table().predict(c) * (1.2 + 0.05 * rng.random())) for c in (SPACE.sample(rng) for _ in range(16))]

    def squares(t):
        return sum((t.predict(c) - ms) ** 2 for c, ms in measured)

    calibrated = table().calibrated(measured)
    assert squares(calibrated) < squares(table()) / 10
    assert calibrated.fit_error(measured).mean < 0.02


def test_calibration_on_one_point_moves_the_offset_alone():
    calibrated = table().calibrated([(SPACE.dense, 30.0)] * 3)
    assert calibrated.pair_ms == table().pair_ms
    assert calibrated.predict(SPACE.dense) == pytest.approx(30)


def test_calibration_refuses_measurements_that_contradict_the_table():
    with pytest.raises(MeasurementError, match="does not rise"):
        table().calibrated([(SPACE.dense, 5.0), (SPACE.sparsest, 9.0)])


def test_json_round_trip_is_exact():
    t = table()
    again = LatencyTable.from_json(t.to_json())
    assert again == t
    assert hash(again) == hash(t)
    again.check_identity(IDENTITY)


def test_any_changed_character_of_the_file_is_found():
    text = table().to_json()
    rng = Random(0)
    for position in rng.sample(range(len(text)), 300):
        damaged = text[:position] + chr(ord(text[position]) ^ (1 << rng.randrange(7))) + text[position + 1 :]
        with suppress(CheckpointError):
            assert LatencyTable.from_json(damaged) == table()  # a changed white space
    for end in range(0, len(text) - 2, 97):
        with pytest.raises(CheckpointError, match=r"table\.json"):
            LatencyTable.from_json(text[:end], "table.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{}", '{"format": "sparsevit-latency-table-1"}', "[" * 100_000]
)
def test_files_that_are_no_table(text):
    with pytest.raises(CheckpointError):
        LatencyTable.from_json(text)


def test_a_table_is_refused_elsewhere_with_the_fields_that_differ():
    other = IDENTITY | {"device": "cpu Y", "batch": 1, "threads": 2}
    with pytest.raises(CheckpointError) as caught:
        table().check_identity(other)
    message = str(caught.value)
    assert "batch 4 there, 1 here" in message
    assert "device 'cpu X' there, 'cpu Y' here" in message
    assert "threads None there, 2 here" in message
    assert "dtype" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"overhead_ms": (0.1,)},
        {"pair_ms": ()},
        {"pair_ms": ((), (), (), ())},
        {"pair_ms": (((),),), "overhead_ms": (0.0,)},
        {"pair_ms": (((1.0, 2.0), (1.0,)),), "overhead_ms": (0.0,)},
        {"base_ms": float("nan")},
        {"overhead_ms": (0.1, float("inf"), 0.1, 0.1)},
    ],
)
def test_tables_that_cannot_be(change):
    fields = json.loads(table().to_json())["table"] | change
    with pytest.raises(ConfigError, match="latency table"):
        LatencyTable(**fields)
