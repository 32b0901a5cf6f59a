"""CUDA graphs: which one a call replays, on a CPU with a recorder that runs the model; on a GPU the real thing."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli import acceleration
from sparsevit_cli.acceleration import Recording, accelerate_
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import held
from sparsevit_cli.swin import blocks, held_biases, is_unwatched, set_sparsity, sparsify_
from tiny import tiny_swin


def small_swin(device: str = "cpu") -> nn.Module:
    model = sparsify_(tiny_swin(img_size=56, embed_dim=32, depths=(2, 2)).eval().to(device))
    set_sparsity(model, 0.5)
    return model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all recordings; a recording runs the model at every replay into the same memory, as a graph does, with
    the position biases that it met.
    """
    shapes: list[tuple[int, ...]] = []

    def record(model: nn.Module, x: Tensor) -> Recording:
        shapes.append(tuple(x.shape))
        entered = x.clone()
        with held_biases() as biases:
            left = type(model).forward(model, entered)

        def replay() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(blocks, "remembered_bias", lambda block, *_: biases[block].bias)
                left.copy_(type(model).forward(model, entered))

        return Recording(entered, left, replay, None, biases)

    monkeypatch.setattr(acceleration, "record", record)
    monkeypatch.setattr(acceleration, "is_replayable", lambda x: is_unwatched(x.device))
    return shapes


@torch.inference_mode()
def test_one_recording_serves_a_shape_and_outputs_stay_their_callers(recorded: list[tuple[int, ...]]) -> None:
    model = small_swin()
    inputs = torch.randn(2, 1, 3, 56, 56)
    expected = [model(x) for x in inputs]
    assert accelerate_(model, inputs[0]) is model
    found = [model(x) for x in inputs]
    assert recorded == [(1, 3, 56, 56)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    model(torch.randn(2, 3, 56, 56))
    assert recorded == [(1, 3, 56, 56), (2, 3, 56, 56)]


@torch.inference_mode()
def test_ratios_and_moved_weights_are_recorded_anew(recorded: list[tuple[int, ...]]) -> None:
    model, x = small_swin(), torch.randn(1, 3, 56, 56)
    sparse = accelerate_(model, x)(x)
    set_sparsity(model, 0.0)
    dense = model(x)
    assert len(recorded) == 2
    assert not torch.allclose(sparse, dense)
    set_sparsity(model, 0.5)
    torch.testing.assert_close(model(x), sparse)
    assert len(recorded) == 2
    model.head.fc.weight.data = model.head.fc.weight.data * 2
    model.head.fc.bias.zero_()
    assert not torch.allclose(model(x), sparse)
    assert len(recorded) == 3


def test_a_changed_position_bias_is_recorded_anew(
    recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "is_asynchronous", lambda device: True)
    model, x = small_swin(), torch.randn(2, 3, 56, 56)
    table = model.layers[0].blocks[0].attn.relative_position_bias_table

    def change(*, counted: bool = True) -> None:
        (table if counted else table.data).mul_(-50.0)

    def seen() -> Tensor:
        found, _ = (model(images) for images in (x, x[:1]))
        torch.testing.assert_close(found, type(model).forward(model, x))
        return found

    with torch.no_grad():
        accelerate_(model, x)
        found = [seen()]
        model.head.fc.bias.add_(1.0)  # read where it stands
        found.append(seen())
        assert [shape[0] for shape in recorded] == [2, 2, 1], "one in inference mode"
        change()
        found.append(seen())
        assert len(recorded) == 5
        change(counted=False)
        model.train().eval()
        found.append(seen())
        assert len(recorded) == 7
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(found))


def test_what_no_graph_holds_runs_as_before(recorded: list[tuple[int, ...]]) -> None:
    model, x = accelerate_(small_swin()), torch.randn(1, 3, 56, 56)
    model(x).sum().backward()
    assert model.head.fc.weight.grad is not None
    with torch.no_grad():
        model.train()(x)
    assert not recorded
    with torch.no_grad():
        model.eval()(x)
        assert len(recorded) == 1


@torch.inference_mode()
def test_the_oldest_recording_goes_first(recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "MAX_GRAPHS", 2)
    model = accelerate_(small_swin())
    for batch in (1, 2, 1, 3, 1, 2):
        model(torch.randn(batch, 3, 56, 56))
    assert [shape[0] for shape in recorded] == [1, 2, 3, 2]


@torch.inference_mode()
def test_copies_record_for_themselves(recorded: list[tuple[int, ...]]) -> None:
    x = torch.randn(1, 3, 56, 56)
    model = accelerate_(small_swin(), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.model is other
        other.head.fc.bias += 1.0
        torch.testing.assert_close(other(x), model(x) + 1.0)
    assert len(recorded) == 3


def test_a_cpu_has_nothing_to_replay() -> None:
    x = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        model = small_swin()
        torch.testing.assert_close(accelerate_(copy.deepcopy(model), x)(x), model(x))


def test_somebody_elses_forward_is_refused() -> None:
    model = small_swin()
    model.forward = lambda x: x
    with pytest.raises(ConfigError, match="was replaced"):
        accelerate_(model)


def test_held_indices_outlive_the_common_memory() -> None:
    sizes, device = (12, 12, (7, 7), (3, 3)), torch.device("cpu")
    with held.held_indices() as kept:
        index = held.token_index_of(*sizes, "roll_first", device)
        assert held.token_index_of(*sizes, "roll_first", device) is index
        assert not torch.equal(held.token_index_of(*sizes, "pad_first", device), index)
        held.shift_mask_of(*sizes, device)
    assert len(kept) == 3
    assert held.token_index_of(*sizes, "roll_first", device) is not index
    assert torch.equal(held.token_index_of(*sizes, "roll_first", device), index)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["portable", "triton"])
@pytest.mark.parametrize("size", [56, 72])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_gpu_gives_the_numbers_of_a_cpu(kernels: str, size: int, ratio: float) -> None:
    model = sparsify_(small_swin("cpu"), kernels="portable")
    model.set_input_size((size, size), window_size=7)
    set_sparsity(model, ratio, exact=False)
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = model(x)
        there = sparsify_(model, kernels=kernels).cuda()  # type: ignore[arg-type]
        torch.testing.assert_close(there(x.cuda()).cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["portable", "triton"])
@pytest.mark.parametrize("size", [56, 72])  # without and with padding
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_graph_equals_the_model(kernels: str, size: int, ratio: float) -> None:
    model = sparsify_(small_swin("cuda"), kernels=kernels)  # type: ignore[arg-type]
    model.set_input_size((size, size), window_size=7)
    set_sparsity(model, ratio, exact=False)
    unaccelerated, inputs = copy.deepcopy(model), torch.randn(3, 2, 3, size, size, device="cuda")
    with torch.inference_mode():
        accelerate_(model, inputs[0])
        for x in inputs:
            torch.testing.assert_close(model(x), unaccelerated(x), atol=1e-5, rtol=1e-5)
            for either in (model, unaccelerated):  # the position bias too counts at once
                for parameter in either.parameters():
                    parameter.mul_(1.1)
