from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gluonts.torch.distributions import BetaOutput, NormalOutput, PoissonOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.distributions import resolve_head
from moecast.forecasters.network import resolve_scaling
from moecast.forecasters.scaling import SCALINGS, WindowScaler
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


@pytest.mark.parametrize("scaling", SCALINGS)
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
    with pytest.raises(ValueError, match=f"scaling='{scaling}' is unknown: choose one of std, "):
        WindowScaler(scaling)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, -1.0, 1e6]),
    st.floats(0.0, 0.9),
)
def test_regularised_std_is_moirais_in_double_precision(
    seed: int, spread: float, level: float, missing: float
) -> None:
    """Of single numbers, too: a variance of 1 about a level of a million is lost in theirs."""
    values, observed = random_windows(seed, missing)
    values, observed = (values * spread + level).float(), observed.float()
    junk = torch.where(observed == 1, values, torch.full_like(values, 1e9))
    scaled, loc, scale = WindowScaler("regularised_std")(junk, observed)
    assert loc.shape == scale.shape == (3, 1, 2)
    assert loc.dtype == scale.dtype == scaled.dtype == torch.float32
    for window in range(3):
        for channel in range(2):
            seen = observed[window, :, channel] == 1
            known = values[window, seen, channel].numpy().astype(np.float64)
            deviation = np.sqrt(known.var(ddof=1) + 1e-5)
            assert loc[window, 0, channel].item() == pytest.approx(known.mean(), rel=1e-6, abs=1e-9)
            assert scale[window, 0, channel].item() == pytest.approx(deviation, rel=1e-6)
    torch.testing.assert_close(scaled, (junk - loc) / scale)


@pytest.mark.parametrize("seen", [(4,), ()], ids=["one value", "none"])
def test_regularised_std_without_a_variance(seen: tuple[int, ...]) -> None:
    """One value is its own mean; without any, the filled-in values tell the location alone."""
    values = torch.arange(6.0).reshape(1, 6, 1) ** 2
    observed = torch.zeros_like(values)
    observed[:, list(seen)] = 1.0
    _, loc, scale = WindowScaler("regularised_std")(values, observed)
    assert loc.item() == pytest.approx(16.0 if seen else 55 / 6)
    assert scale.item() == pytest.approx(math.sqrt(1e-5))


def test_regularised_std_of_a_constant_window_is_that_of_the_added_variance() -> None:
    values = torch.full((1, 7, 1), 123456.789)
    scaled, loc, scale = WindowScaler("regularised_std")(values, torch.ones_like(values))
    assert loc.item() == values[0, 0, 0].item()
    assert scale.item() == pytest.approx(math.sqrt(1e-5))
    assert torch.equal(scaled, torch.zeros_like(scaled))


# Which scalings a head's support allows, the default first.
REAL = ("std", "regularised_std", "mean", "none")
NOT_SHIFTED = ("mean", "none")
BOUNDED = ("none",)


@pytest.mark.parametrize(
    ("head", "allowed"),
    [
        ("student_t", REAL),
        ("moirai_mixture", REAL),
        ("quantile(0.1, 0.9)", REAL),
        (NormalOutput(), REAL),
        ("negative_binomial", NOT_SHIFTED),
        ("poisson", NOT_SHIFTED),
        ("gamma", NOT_SHIFTED),
        ("log_normal", NOT_SHIFTED),
        ("mixture(poisson, negative_binomial)", NOT_SHIFTED),
        (PoissonOutput(), NOT_SHIFTED),
        ("beta", BOUNDED),
        (BetaOutput(), BOUNDED),
    ],
    ids=str,
)
def test_heads_allow_the_scalings_that_keep_their_support(
    head: Any, allowed: tuple[str, ...]
) -> None:
    head = resolve_head(head)
    assert resolve_scaling("auto", head) == allowed[0]
    assert resolve_scaling(None, head) == "none"
    for scaling in allowed:
        assert resolve_scaling(scaling, head) == scaling
    for scaling in set(SCALINGS) - set(allowed):
        message = (
            f"scaling='{scaling}' takes values out of .*: use scaling='{allowed[0]}' or 'auto'"
        )
        with pytest.raises(ValueError, match=message):
            resolve_scaling(scaling, head)
    with pytest.raises(ValueError, match="scaling='robust' is unknown"):
        resolve_scaling("robust", head)
