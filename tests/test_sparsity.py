"""SparsityConfig and SearchSpace."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig, pairs_per_stage, ratio_to_tenths

PUBLISHED = [[0.6], [0], [0.2, 0.4, 0.5], [0]]
depths = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
spaces = st.builds(SearchSpace, depths, st.integers(0, 8).map(lambda t: t / 10))


def test_published_configuration():
    config = SparsityConfig.from_ratios(PUBLISHED, depths=(2, 2, 6, 2))
    assert config.tenths == ((6,), (0,), (2, 4, 5), (0,))
    assert config.ratios == ((0.6,), (0.0,), (0.2, 0.4, 0.5), (0.0,))
    assert config.pairs == (1, 1, 3, 1)
    assert str(config) == "[[0.6], [0], [0.2, 0.4, 0.5], [0]]"
    assert not config.is_dense


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, lambda r: Decimal(str(r))])
def test_every_grid_ratio_of_every_number_type(kind):
    assert [ratio_to_tenths(kind(t / 10)) for t in range(9)] == list(range(9))
    assert ratio_to_tenths(0.1 + 0.2) == 3


@pytest.mark.parametrize("ratio", [0.05, 0.9, 1, -0.1, math.nan, math.inf, True, "0.5", None, 10**400])
def test_ratios_off_the_grid(ratio):
    with pytest.raises(ConfigError, match=r"allowed are 0, 0\.1"):
        ratio_to_tenths(ratio)


@pytest.mark.parametrize(
    "ratios",
    [[], [[]], [0.5], 0.5, "dense", [[0.5], "0"], [[0.5, 0.3]], [[0.55]], None, {"stage": 0.5}, [[[0.1]]]],
)
def test_nested_lists_that_are_no_configuration(ratios):
    with pytest.raises(ConfigError):
        SparsityConfig.from_ratios(ratios)


@pytest.mark.parametrize("tenths", [(), ((),), ((0.5,),), ((9,),), ((-1,),), ((True,),), ((3, 2),), 5, ((1,), 2)])
def test_tenths_that_are_no_configuration(tenths):
    with pytest.raises(ConfigError):
        SparsityConfig(tenths)


def test_one_number_means_everywhere_and_needs_depths():
    assert SparsityConfig.from_ratios(0.6, (2, 3, 6, 1)).tenths == ((6,), (6, 6), (6, 6, 6), (6,))
    assert SparsityConfig.dense((2, 2)).is_dense
    with pytest.raises(ConfigError, match="unknown depth"):
        SparsityConfig.from_ratios(0.6)


def test_depths_must_agree():
    for wrong in ((2, 2, 6), (2, 2, 2, 2), (2, 2, 8, 2)):
        with pytest.raises(ConfigError, match="block pairs"):
            SparsityConfig.from_ratios(PUBLISHED, wrong)
    config = SparsityConfig.from_ratios(PUBLISHED)
    assert SparsityConfig.from_ratios(config, (2, 2, 5, 1)) is config


def test_a_decreasing_stage_is_told_the_sorted_one():
    with pytest.raises(ConfigError, match=r"Try \[0\.2, 0\.4\]"):
        SparsityConfig.from_ratios([[0.4, 0.2]])


@given(spaces, st.integers())
def test_configurations_are_values(space, seed):
    config = space.sample(Random(seed))
    assert config in space
    assert SparsityConfig.from_ratios(config.ratios, space.depths) == config
    assert SparsityConfig([list(stage) for stage in config.tenths]) == config
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (twin, hash(twin)) == (config, hash(config))
    with pytest.raises(AttributeError):
        config.tenths = ()


@given(st.builds(SearchSpace, st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.just(0.3)))
def test_a_space_is_all_sorted_tuples_once(space):
    configs = list(space)
    assert len(configs) == len(set(configs)) == len(space) == space.size
    assert configs == sorted(configs)
    assert all(config in space for config in configs)
    assert configs[0] == space.dense
    assert configs[-1] == space.sparsest
    assert space.middle in space


def test_sizes_of_the_method():
    assert len(SearchSpace((2, 2, 6, 2))) == 120_285
    assert len(SearchSpace((18,))) == 24_310
    assert SearchSpace((50,) * 4).size == math.comb(33, 8) ** 4  # more than len() may say


def test_membership_needs_shape_and_range():
    space = SearchSpace((2, 2), max_ratio=0.5)
    assert space.uniform(0.5) in space
    assert space.uniform(0.6) not in space
    assert SearchSpace((2, 4)).dense not in space
    assert "dense" not in space


@given(spaces, st.integers())
def test_repair_sorts_within_the_stage_and_keeps_the_genes(space, seed):
    rng = Random(seed)
    genes = [[rng.randint(0, space.max_tenths) for _ in range(pairs)] for pairs in space.pairs]
    repaired = space.repair(genes)
    assert [list(stage) for stage in repaired.tenths] == [sorted(stage) for stage in genes]


def test_sampling_is_uniform_per_gene_and_a_function_of_the_generator():
    space = SearchSpace((2,))
    drawn = [space.sample(Random(seed)).tenths[0][0] for seed in range(9000)]
    assert all(800 < drawn.count(t) < 1200 for t in range(9))
    assert space.sample(Random(5)) == space.sample(Random(5))


@pytest.mark.parametrize("bad", [(), (0,), (2, -1), (2.0,), (True,)])
def test_depths_that_cannot_be(bad):
    with pytest.raises(ConfigError, match="depths"):
        SearchSpace(bad)


@pytest.mark.parametrize("bad", [0.85, 0.9, -0.1, math.nan, "0.5"])
def test_max_ratio_on_the_grid(bad):
    with pytest.raises(ConfigError, match="max_ratio"):
        SearchSpace((2, 2), max_ratio=bad)


def test_odd_depths_have_a_pair_of_one_block():
    assert pairs_per_stage((1, 2, 3, 18)) == (1, 1, 2, 9)
