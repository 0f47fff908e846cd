"""Routers and experts on the device against torch."""

from __future__ import annotations

from typing import Iterator

import pytest
import torch
from moecast.backends import Mixed, TorchBackend
from moecast.backends.ttnn import PRECISIONS, TtnnBackend
from ttnn_cases import Layer, check_close, check_mixed, layer, needs_numbers

pytestmark = pytest.mark.ttnn
TORCH = TorchBackend()


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def routed(backend: TorchBackend, case: Layer) -> Mixed:
    return backend.routed_ffn(*case)


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
    weights, ids = TORCH.route(case.scoring.logits(case.x), case.top_k)
    arguments = case.x, weights, ids, case.expand, case.contract
    check_close(TtnnBackend().gated_ffn(*arguments), TORCH.gated_ffn(*arguments), "given experts")


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
