from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.scaling import WindowScaler
from torch import Tensor


def random_windows(seed: int, missing: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 12, 2, generator=generator, dtype=torch.float64) + 2.0
    observed = (torch.rand(3, 12, 2, generator=generator) >= missing).double()
    observed[:, :2] = 1.0
    return values, observed


@pytest.mark.parametrize("scaling", ["std", "mean"])
def test_moments_are_those_of_the_observed_values(scaling: str) -> None:
    values, observed = random_windows(0)
    junk = torch.where(observed == 1, values, torch.full_like(values, 1e6))
    scaled, loc, scale = WindowScaler(scaling)(junk, observed)
    assert loc.shape == scale.shape == (3, 1, 2)
    for window in range(3):
        for channel in range(2):
            seen = observed[window, :, channel] == 1
            known = values[window, seen, channel].numpy()
            if scaling == "std":
                expected = known.mean(), known.std()
            else:
                expected = 0.0, np.abs(known).mean()
            assert loc[window, 0, channel].item() == pytest.approx(expected[0])
            assert scale[window, 0, channel].item() == pytest.approx(expected[1])
    torch.testing.assert_close(scaled * scale + loc, junk)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_scaling_follows_shift_and_scale(seed: int, factor: float, shifts: float) -> None:
    values, observed = random_windows(seed)
    shift = shifts * factor
    scaler = WindowScaler("std")
    scaled, loc, scale = scaler(values, observed)
    moved, moved_loc, moved_scale = scaler(values * factor + shift, observed)
    torch.testing.assert_close(moved, scaled, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved_loc, loc * factor + shift)
    torch.testing.assert_close(moved_scale, scale * factor, rtol=1e-4, atol=1e-9)

    scaler = WindowScaler("mean")
    scaled, loc, scale = scaler(values, observed)
    enlarged, enlarged_loc, enlarged_scale = scaler(values * factor, observed)
    torch.testing.assert_close(enlarged, scaled)
    assert torch.equal(loc, torch.zeros_like(loc))
    assert torch.equal(enlarged_loc, loc)
    torch.testing.assert_close(enlarged_scale, scale * factor)


@pytest.mark.parametrize("scaling", ["std", "mean", "none"])
def test_only_the_windows_own_context_counts(scaling: str) -> None:
    values, observed = random_windows(1)
    together = WindowScaler(scaling)(values, observed)
    for window in range(3):
        for channel in range(2):
            part = (slice(window, window + 1), slice(None), slice(channel, channel + 1))
            for ours, alone in zip(together, WindowScaler(scaling)(values[part], observed[part])):
                torch.testing.assert_close(ours[part], alone)


def test_none_leaves_the_values_alone() -> None:
    values, observed = random_windows(2)
    scaled, loc, scale = WindowScaler("none")(values, observed)
    assert torch.equal(scaled, values)
    assert torch.equal(loc, torch.zeros(3, 1, 2, dtype=torch.float64))
    assert torch.equal(scale, torch.ones(3, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize("scaling", ["std", "mean"])
@pytest.mark.parametrize("level", [-5.0, 1e-4, 3.0, 1e6, 0.1, 123456.789])
@pytest.mark.parametrize("length", [1, 7, 336])
def test_a_constant_window_has_its_level_as_scale(scaling: str, level: float, length: int) -> None:
    values = torch.full((1, length, 1), level)
    scaled, loc, scale = WindowScaler(scaling)(values, torch.ones_like(values))
    assert scale.item() == pytest.approx(abs(level), rel=1e-5)
    expected = 0.0 if scaling == "std" else math.copysign(1.0, level)
    torch.testing.assert_close(scaled, torch.full_like(values, expected), rtol=0, atol=1e-5)
    assert loc.item() == pytest.approx(level if scaling == "std" else 0.0, rel=1e-5)


@pytest.mark.parametrize("scaling", ["std", "mean"])
def test_a_window_of_zeros_is_not_scaled(scaling: str) -> None:
    values = torch.zeros(1, 5, 1)
    scaled, loc, scale = WindowScaler(scaling)(values, torch.ones_like(values))
    assert (scale.item(), loc.item(), scaled.abs().max().item()) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("scaling", ["std", "mean"])
def test_where_nothing_is_observed_the_filled_in_values_count(scaling: str) -> None:
    values, observed = random_windows(3)
    observed[0, :, 0] = 0.0
    expected = observed.clone()
    expected[0, :, 0] = 1.0
    for ours, theirs in zip(
        WindowScaler(scaling)(values, observed), WindowScaler(scaling)(values, expected)
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scaling", ["STD", "", "robust"])
def test_unknown_scalings_are_refused(scaling: str) -> None:
    with pytest.raises(ValueError, match=f"scaling='{scaling}' is unknown: choose one of std, mea"):
        WindowScaler(scaling)
