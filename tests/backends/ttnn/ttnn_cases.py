"""Problems for the device, and how their results are compared."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from moecast.backends import Mixed, Scoring
from moecast.backends.ttnn import find_device
from torch import Tensor

_DEVICE = find_device()
IS_MOCK = _DEVICE is not None and _DEVICE.kind == "mock"


class Layer(NamedTuple):
    """Tokens, and a layer of experts under a router."""

    x: Tensor
    scoring: Scoring
    top_k: int
    expand: Tensor
    contract: Tensor


def layer(
    kind: str, tokens: int = 40, experts: int = 6, features: int = 48, hidden: int = 40, k: int = 2
) -> Layer:
    """Random numbers; sizes that fill no tile unless told otherwise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = normal(experts, features)
    by_distance = kind == "distance"
    scoring = Scoring(
        rows if by_distance else 0.3 * rows, by_distance, weighted_by_score=not by_distance
    )
    expand = normal(experts, features, 2 * hidden) / features**0.5
    contract = normal(experts, hidden, features) / hidden**0.5
    return Layer(normal(tokens, features), scoring, k, expand, contract)


def correlation(this: Tensor, that: Tensor) -> float:
    """Pearson's, of all numbers."""
    return float(torch.corrcoef(torch.stack([this.flatten(), that.flatten()]).double())[0, 1])


def relative_error(this: Tensor, that: Tensor) -> float:
    """Of the root mean square."""
    return float((this - that).norm() / that.norm())


def check_mixed(found: Mixed, expected: Mixed, label: str, error: float = 0.02) -> None:
    """Compare, but on a mock device shapes alone.

    Expert outputs are compared where the same experts were chosen, which they must be wherever
    the scores of the last chosen and the first left out differ by more than their precision, 2%.
    """
    for mine, theirs in zip(found, expected):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
    if IS_MOCK:
        return
    k = expected.ids_TK.shape[-1]
    same = (found.ids_TK.sort().values == expected.ids_TK.sort().values).all(dim=-1)
    if k < expected.scores_TE.shape[-1]:
        ordered = expected.scores_TE.sort(descending=True).values
        clear = ordered[..., k - 1] > 1.02 * ordered[..., k]
        assert same[clear].all()
        assert clear.float().mean() > 0.8
    outputs = correlation(found.y_TO[same], expected.y_TO[same])
    weights = correlation(_dense(found)[same], _dense(expected)[same])
    off = relative_error(found.y_TO[same], expected.y_TO[same])
    print(
        f"\n{label}: PCC of outputs {outputs:.6f}, of weights {weights:.6f}, relative error "
        f"{off:.4f}, same experts {same.float().mean():.3f}"
    )
    assert outputs >= 0.999
    assert weights >= 0.99
    assert off <= error


def check_close(found: Tensor, expected: Tensor, label: str, error: float = 0.02) -> None:
    assert found.shape == expected.shape
    if IS_MOCK:
        return
    pcc, off = correlation(found, expected), relative_error(found, expected)
    print(f"\n{label}: PCC {pcc:.6f}, relative error {off:.4f}")
    assert pcc >= 0.999
    assert off <= error


def needs_numbers() -> None:
    if IS_MOCK:
        pytest.skip("a mock device computes no numbers")


def needs_two_queues() -> None:
    from moecast.backends.ttnn.device import the_device

    if not the_device().copies_ahead:
        pytest.skip("slow dispatch and a mock device have one command queue")


def _dense(mixed: Mixed) -> Tensor:
    zeros = torch.zeros_like(mixed.scores_TE)
    return zeros.scatter(-1, mixed.ids_TK, mixed.weights_TK)
