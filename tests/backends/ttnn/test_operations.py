"""Routers and experts on the device against torch."""

from __future__ import annotations

import gc
from typing import Callable, Iterator

import pytest
import torch
from moecast.backends import Mixed, TorchBackend
from moecast.backends.ttnn import PRECISIONS, TtnnBackend
from torch import Tensor
from ttnn_cases import Layer, check_close, check_mixed, layer, needs_numbers, needs_two_queues

pytestmark = pytest.mark.ttnn
TORCH = TorchBackend()


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


Call = Callable[[TorchBackend, Layer], Tensor]


def routed(backend: TorchBackend, case: Layer) -> Mixed:
    return backend.routed_ffn(*case)


def routed_outputs(backend: TorchBackend, case: Layer) -> Tensor:
    return routed(backend, case).y_TO


def given_outputs(backend: TorchBackend, case: Layer) -> Tensor:
    """Of the experts that torch chooses."""
    weights, ids = TORCH.route(case.scoring.logits(case.x), case.top_k)
    return backend.gated_ffn(case.x, weights, ids, case.expand, case.contract)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "distance"])
def test_routed_experts_are_those_of_torch(kind: str, precision: str) -> None:
    case = layer(kind)
    label = f"{kind} router and experts, {precision}"
    check_mixed(routed(TtnnBackend(precision), case), routed(TORCH, case), label)


def test_all_experts_may_be_chosen() -> None:
    case = layer("linear", k=6)
    check_mixed(routed(TtnnBackend(), case), routed(TORCH, case), "top-6 of 6")


def test_chosen_experts_may_be_given() -> None:
    case = layer("linear")
    check_close(given_outputs(TtnnBackend(), case), given_outputs(TORCH, case), "given experts")


def test_one_token_is_as_among_many() -> None:
    """Neither the tokens' padding nor their number shows."""
    needs_numbers()
    case = layer("linear")
    alone = routed(TtnnBackend(), case._replace(x=case.x[:1]))
    among = routed(TtnnBackend(), case)
    for one, many in zip(alone, among):
        torch.testing.assert_close(one, many[:1])


def test_a_token_that_is_not_a_number_stays_alone() -> None:
    needs_numbers()
    case = layer("linear")
    spoilt = case.x.clone()
    spoilt[3] = torch.inf
    found = routed(TtnnBackend(), case._replace(x=spoilt))
    expected = routed(TtnnBackend(), case)
    others = torch.arange(len(case.x)) != 3
    torch.testing.assert_close(found.y_TO[others], expected.y_TO[others])


def test_later_batches_are_as_exact_as_the_first() -> None:
    """Of two layers in turn, where commands are replayed the third batch of each is the first."""
    from moecast.backends.ttnn.device import the_device

    needs_numbers()
    layers = [layer(kind) for kind in ("linear", "distance")]
    backend = TtnnBackend()
    for batch in range(4):
        for case in layers if batch else layers[:1]:
            moved = case._replace(x=case.x.roll(batch, dims=0))
            found = routed(backend, moved)
            expected = routed(TORCH, moved)
            check_mixed(found, expected, f"batch {batch}")
    assert the_device().num_traces in (None, len(layers))


@pytest.mark.parametrize("most", [1, 128])
def test_numbers_of_tokens_in_turn_are_replayed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one trace is all that there may be, each discards the other's."""
    from moecast.backends.ttnn import device

    needs_numbers()
    monkeypatch.setattr(device, "MOST_TRACES", most)
    many = layer("linear")
    few = many._replace(x=many.x[:8])
    backend = TtnnBackend()
    expected = routed(backend, many)
    for case in (few, many, few, many, few):
        for found, whole in zip(routed(backend, case), expected):
            torch.testing.assert_close(found, whole[: len(case.x)], rtol=0, atol=0)
    assert device.the_device().num_traces in (None, min(most, 2))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("call", [routed_outputs, given_outputs])
def test_pieces_are_as_exact_as_the_whole(
    call: Call, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit. The first batch computes a piece, records the next and replays the rest."""
    from moecast.backends.ttnn import device

    needs_two_queues()
    case, backend = layer("linear", tokens=150), TtnnBackend(precision)
    whole = call(backend, case)
    monkeypatch.setattr(device, "PIECE_ROWS", 32)
    for batch in range(3):
        found = call(backend, case._replace(x=case.x.roll(batch, dims=0)))
        assert torch.equal(found, whole.roll(batch, dims=0))
        assert device.the_device().num_traces == 1
    case.contract.mul_(2.0)
    assert torch.equal(call(backend, case), 2.0 * whole)


def test_each_piece_is_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    from moecast.backends.ttnn import device
    from moecast.backends.ttnn.counting import counted

    needs_two_queues()
    monkeypatch.setattr(device, "PIECE_ROWS", 32)
    case, backend = layer("linear", tokens=70), TtnnBackend()
    for tokens, pieces in ((70, 3), (32, 1)):
        part = case._replace(x=case.x[:tokens])
        routed(backend, part)  # The weights are uploaded here.
        with counted() as counts:
            routed(backend, part)
        assert (counts.uploads, counts.downloads) == (pieces, pieces)


def test_changed_weights_are_uploaded_again() -> None:
    case = layer("linear")
    backend = TtnnBackend()
    before = routed(backend, case)
    case.contract.mul_(2.0)
    after = routed(backend, case)
    needs_numbers()
    torch.testing.assert_close(after.y_TO, 2.0 * before.y_TO)


def test_weights_are_uploaded_once_and_released_with_their_tensors() -> None:
    from moecast.backends.ttnn.device import the_device

    gc.collect()  # A skipped test's weights wait for it.
    backend, case = TtnnBackend(), layer("linear")
    routed(backend, case)
    kept = len(the_device().weights)
    routed(backend, case)
    assert len(the_device().weights) == kept
    del case
    assert len(the_device().weights) == kept - 2


def test_gradients_are_left_to_torch() -> None:
    case = layer("linear")
    with torch.enable_grad():
        case.contract.requires_grad_()
        routed(TtnnBackend(), case).y_TO.sum().backward()
    assert case.contract.grad is not None


def test_moirai_small_fits() -> None:
    """32 experts, 384 to 512 to 384: the published small shape."""
    case = layer("distance", tokens=32, experts=32, features=384, hidden=512)
    check_mixed(routed(TtnnBackend(), case), routed(TORCH, case), "MOIRAI small's layer")
