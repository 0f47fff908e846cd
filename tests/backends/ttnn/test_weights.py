"""What is made of weights lives as long as they do, unchanged."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from moecast.backends.ttnn.device import bucket, whole_tiles
from moecast.backends.ttnn.weights import WeightCache
from torch import Tensor, nn


class Shelf:
    """A cache of numbered things, and which of them were released."""

    def __init__(self) -> None:
        self.made = 0
        self.released: list[int] = []
        self.cache = WeightCache(self.released.append)

    def get(self, *tensors: Tensor, purpose: str = "") -> int:
        return self.cache.get(tensors, purpose, self._make)

    def _make(self) -> int:
        self.made += 1
        return self.made


def test_the_same_weights_are_made_once() -> None:
    shelf, (one, two) = Shelf(), torch.randn(2, 3)
    assert shelf.get(one, two) == shelf.get(one, two) == 1
    assert shelf.get(two, one) == 2
    assert shelf.get(one, two, purpose="other precision") == 3
    assert shelf.get(one.clone(), two) == 4


def replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()


def optimised(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def loaded(weight: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.zeros_like(weight)})


def multiplied(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


@pytest.mark.parametrize("change", [replaced, optimised, loaded, multiplied])
def test_a_change_makes_them_anew(change: Callable[[nn.Parameter], None]) -> None:
    shelf, weight = Shelf(), nn.Parameter(torch.randn(3))
    other = torch.randn(3)
    assert shelf.get(other, weight) == 1
    change(weight)
    assert shelf.get(other, weight) == 2
    assert shelf.released == [1]
    assert len(shelf.cache) == 1


def test_they_go_with_any_of_their_tensors() -> None:
    shelf, weight, other = Shelf(), torch.randn(3), torch.randn(3)
    shelf.get(weight, other)
    shelf.get(other)
    del weight
    assert shelf.released == [1]
    del other
    assert shelf.released == [1, 2]
    assert len(shelf.cache) == 0


def test_emptying_releases_each_once() -> None:
    shelf, weight = Shelf(), torch.randn(3)
    shelf.get(weight)
    shelf.cache.clear()
    del weight
    assert shelf.released == [1]


def test_weights_of_inference_mode_are_kept_too() -> None:
    shelf = Shelf()
    with torch.inference_mode():
        weight = torch.randn(3)
    assert shelf.get(weight) == shelf.get(weight) == 1


def test_few_numbers_of_tokens_are_ever_compiled() -> None:
    assert [bucket(rows) for rows in (1, 32, 33, 64, 100, 1024, 1025)] == [
        32, 32, 64, 64, 128, 1024, 2048,
    ]  # fmt: skip
    assert [whole_tiles(size) for size in (1, 32, 33)] == [32, 32, 64]
