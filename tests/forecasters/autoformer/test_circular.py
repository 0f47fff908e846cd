"""Circular correlation and convolution against sums over all pairs of steps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.autoformer.circular import circular_convolution, circular_correlation
from torch import Tensor

# Odd and even lengths, of which the spectra differ.
LENGTHS = st.integers(1, 11)
SEEDS = st.integers(0, 2**16)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def correlation_by_loops(query: Tensor, key: Tensor) -> Tensor:
    length = query.shape[1]
    result = query.new_zeros(query.shape[:3])
    for delay in range(length):
        for step in range(length):
            result[:, delay] += (query[:, step] * key[:, (step - delay) % length]).sum(dim=-1)
    return result


def move_by_loops(weights: Tensor, value: Tensor) -> Tensor:
    length = value.shape[1]
    result = torch.zeros_like(value)
    for step in range(length):
        for delay in range(length):
            result[:, step] += weights[:, delay, :, None] * value[:, (step - delay) % length]
    return result


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_correlation_equals_loops(length: int, heads: int, features: int, seed: int) -> None:
    query, key = normal(2, 2, length, heads, features, seed=seed)
    expected = correlation_by_loops(query, key)
    torch.testing.assert_close(circular_correlation(query, key), expected)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_moving_equals_loops(length: int, heads: int, features: int, seed: int) -> None:
    weights = normal(2, length, heads, seed=seed)
    value = normal(2, length, heads, features, seed=seed + 1)
    torch.testing.assert_close(circular_convolution(weights, value), move_by_loops(weights, value))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 7), SEEDS, st.booleans())
def test_gradients_are_those_of_the_loops(length: int, seed: int, of_the_first: bool) -> None:
    query, key = normal(2, 2, length, 2, 3, seed=seed)
    weights = normal(2, length, 2, seed=seed + 1)
    for function, loops, arguments in (
        (circular_correlation, correlation_by_loops, (query, key)),
        (circular_convolution, move_by_loops, (weights, key)),
    ):
        gradients = []
        for compute in (function, loops):
            leaves = [argument.clone().requires_grad_() for argument in arguments]
            if not of_the_first:
                # One that nobody asks for must not disturb the other.
                leaves[0] = leaves[0].detach()
            # Not a sum, of which the gradient would be the same for every step.
            compute(*leaves).sin().sum().backward()
            gradients.append([leaf.grad for leaf in leaves if leaf.requires_grad])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gradients_are_finite_differences() -> None:
    for length in (1, 4, 5):
        query, key = normal(2, 2, length, 2, 3, seed=0).requires_grad_().unbind()
        weights = normal(2, length, 2, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(circular_correlation, (query, key))
        assert torch.autograd.gradcheck(circular_convolution, (weights, key))


def test_a_sequence_resembles_itself_most_at_the_delay_it_was_moved_by() -> None:
    key = normal(1, 12, 1, 4, seed=0)
    for delay in range(12):
        moved = key.roll(delay, dims=1)
        assert circular_correlation(moved, key)[0, :, 0].argmax() == delay
        one = torch.zeros(1, 12, 1, dtype=torch.float64)
        one[:, delay] = 1.0
        torch.testing.assert_close(circular_convolution(one, key), moved)
