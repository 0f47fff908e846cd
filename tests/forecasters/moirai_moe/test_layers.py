"""What the layers compute in their own way, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moecast.forecasters.moirai_moe.layers import RMSNorm, Rotation, _weighted_sums
from moirai_cases import inputs_of, network_of

FEATURES = 8


def test_the_norm_and_its_gradients_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(FEATURES), torch.nn.RMSNorm(FEATURES, eps=1e-5)
    x = torch.randn(3, 5, FEATURES, generator=generator)
    x[0, 0] = 0.0
    x[0, 1] *= 1e-4
    weight = torch.randn(FEATURES, generator=generator)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(weight)
        outputs = norm(leaf)
        outputs.square().sum().backward()
        results.append((outputs, leaf.grad, norm.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pairs_in_the_first_half_are_turned(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 7])
    x = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x.double().numpy().copy()
    for row, position in enumerate(positions.tolist()):
        for pair in range(FEATURES // 4):
            angle = position * 10_000.0 ** (-pair / (FEATURES // 4))
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            at = slice(2 * pair, 2 * pair + 2)
            expected[row, at] = turn @ expected[row, at]
    turned = Rotation.of_positions(positions, FEATURES).turn(x)
    assert turned.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(turned.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 4])
def test_weighted_sums_are_products(rows: int, length: int) -> None:
    weights, values = torch.rand(2, 3, rows, length), torch.rand(2, 3, length, FEATURES)
    expected = torch.einsum("abql,ablh->abqh", weights, values)
    torch.testing.assert_close(_weighted_sums(weights, values), expected)


@pytest.mark.parametrize("learning", [False, True])
def test_contexts_are_encoded_in_mixed_precision(learning: bool) -> None:
    network = network_of()
    inputs = inputs_of(network)
    patch_size = network.patch_sizes[0]
    variates = network.variates(inputs, patch_size)
    with torch.set_grad_enabled(learning):
        expected, _, _ = network.encode(variates, inputs, patch_size)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _, _ = network.encode(variates, inputs, patch_size)
    # Where two experts are as far, rounding chooses; on the whole it must not matter.
    assert (hidden - expected).abs().mean() < 0.1 * expected.abs().mean()
