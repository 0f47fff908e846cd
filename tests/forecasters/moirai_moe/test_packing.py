"""Short windows that share rows: which ones, and that nothing else changes by it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_cases import FEATURES, HORIZON, series
from moecast.forecasters.moe import Routing, balance_loss, total_balance_loss
from moecast.forecasters.moirai_moe import MoiraiMoENetwork, packing
from moecast.forecasters.moirai_moe import network as network_module
from moecast.forecasters.moirai_moe.packing import Packing, find_packing, place
from moirai_cases import (
    COVARIATES,
    LONG,
    PATCH,
    network_of,
    predictor_of,
    start_late,
    training_windows,
)
from torch import Tensor

NUMBER = 7
CONTEXT = 26

CASES: dict[str, dict[str, Any]] = {
    "univariate": {"patch_size": [2, 4, 8]},
    "multivariate": {"target_dim": 3},
    "covariates": {"patch_size": [4, 8], **COVARIATES},
    "covariates not ahead": {"covariates_ahead": False, **COVARIATES},
    "all features": {"target_dim": 2, **FEATURES},
    "one patch ahead": {"prediction_length": HORIZON, **COVARIATES},
    "gradient checkpointing": {"gradient_checkpointing": True, "target_dim": 2},
    # On the scale of a window of one value its gradients are beyond the accuracy of float32.
    "published head": {"distr_output": "moirai_mixture", "scaling": "none"},
}

some_lengths = st.lists(st.integers(1, 33), min_size=1, max_size=40)
# Steps that each window has of the context.
observed_steps = st.lists(st.integers(1, CONTEXT), min_size=NUMBER, max_size=NUMBER)


def present_of(lengths: list[int], num_patches: int) -> Tensor:
    return torch.arange(num_patches) >= num_patches - torch.tensor(lengths).unsqueeze(1)


@given(some_lengths)
def test_windows_overlap_nowhere_and_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    first_slots, num_rows, row_length = place(lengths)
    assert row_length == max(lengths)
    filled: list[set[int]] = [set() for _ in range(num_rows)]
    for first, length in zip(first_slots, lengths, strict=True):
        row, begin = divmod(first, row_length)
        slots = set(range(begin, begin + length))
        assert begin + length <= row_length
        assert not filled[row] & slots
        filled[row] |= slots
    assert all(len(a) + len(b) > row_length for a, b in combinations(filled, 2))


def test_windows_are_placed_by_decreasing_length_where_there_is_the_least_room() -> None:
    # Rows of 8: the longest; 6 and 2; 5 and 3.
    assert place([2, 5, 8, 3, 6]) == ([14, 16, 0, 21, 8], 3, 8)


@given(st.lists(st.integers(1, 6), min_size=5, max_size=20), st.integers(6, 12))
def test_what_is_packed_comes_back(lengths: list[int], num_patches: int) -> None:
    present = present_of(lengths, num_patches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_LARGEST_SHARE", 1.0)
        found = find_packing(present)
    assert found is not None
    x = torch.randn(*present.shape, 2, 3)
    packed, slots = found.pack(x), found.slots
    assert slots.window is not None
    assert slots.present is not None
    assert int(slots.present.sum()) == sum(lengths)
    assert (slots.window[~slots.present] == -1).all()
    for row, slot in slots.present.nonzero().tolist():
        window, position = slots.window[row, slot], slots.position[row, slot]
        assert present[window, position]
        assert torch.equal(packed[row, slot], x[window, position])
    assert torch.equal(found.unpack(packed)[present], x[present])
    assert found.unpack(packed).shape == x.shape


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([20] * 10, False),
        ([20] * 9 + [1], False),
        ([20] * 18 + [10] * 2, False),
        ([20] * 8 + [10] * 2, True),
        # Nothing shares a row, but all begin late.
        ([15] * 10, True),
        ([1], True),
    ],
)
def test_packing_is_for_batches_that_it_makes_smaller(lengths: list[int], packs: bool) -> None:
    found = find_packing(present_of(lengths, 20))
    assert (found is not None) is packs
    if found is not None:
        slots = found.patch_of_slot.numel()
        assert sum(lengths) <= slots <= 0.9 * 20 * len(lengths)
    assert find_packing(None) is None


class Trained:
    """What a training step computes, with packing where it pays, wherever it can, or never."""

    def __init__(
        self,
        network: MoiraiMoENetwork,
        windows: dict[str, Tensor],
        patch_size: int,
        largest_share: float,
    ) -> None:
        packings: list[Packing | None] = []

        def find(present: Tensor | None) -> Packing | None:
            packings.append(find_packing(present))
            return packings[-1]

        network.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_LARGEST_SHARE", largest_share)
            patch.setattr(network_module, "find_packing", find)
            torch.manual_seed(0)
            self.losses, self.routings = network.window_losses(windows, patch_size)
        self.balance = total_balance_loss(self.routings)
        (self.losses.mean() + self.balance).backward()
        self.gradients = {name: p.grad for name, p in network.named_parameters()}
        (self.packing,) = packings


def windows_of(
    network: MoiraiMoENetwork, steps: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Windows of contexts of so many steps."""
    windows = training_windows(network, number=len(steps))
    for row, number in enumerate(steps):
        start_late(windows, row, network.window.context_length - number)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in windows.items()
    }


@pytest.mark.parametrize("case", CASES)
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=observed_steps, double=st.booleans())
def test_losses_and_gradients_are_those_without_packing(
    case: str, steps: list[int], double: bool
) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if double else (torch.float32, 1e-5)
    network = network_of(context_length=CONTEXT, **CASES[case]).to(dtype).train()
    windows = windows_of(network, steps, dtype)
    for patch_size in network.patch_sizes:
        plain = Trained(network, windows, patch_size, 0.0)
        packed = Trained(network, windows, patch_size, 1.0)
        assert plain.packing is None
        # Without a single patch of padding, there is nothing to pack.
        patches = {-(-number // patch_size) for number in steps}
        padded = patches != {-(-CONTEXT // patch_size)}
        assert (packed.packing is not None) is padded
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(packed.losses, plain.losses, **close)
        torch.testing.assert_close(packed.balance, plain.balance, **close)
        for name, gradient in plain.gradients.items():
            if gradient is not None:
                torch.testing.assert_close(packed.gradients[name], gradient, **close, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_each_window_is_as_if_it_were_alone_and_padding_counts_nowhere(case: str) -> None:
    network = network_of(context_length=CONTEXT, **CASES[case]).double()
    steps = [3, 26, 9, 12, 1, 20, 5]
    windows = windows_of(network, steps, torch.float64)
    for patch_size in network.patch_sizes:
        packed = Trained(network, windows, patch_size, 0.9)
        assert packed.packing is not None
        alone = [
            Trained(
                network,
                {name: tensor[i : i + 1] for name, tensor in windows.items()},
                patch_size,
                share,
            )
            for i in range(NUMBER)
            for share in (0.0, 0.9)
        ]
        for each in (alone[::2], alone[1::2]):
            losses = torch.cat([window.losses for window in each])
            torch.testing.assert_close(packed.losses, losses, rtol=1e-12, atol=1e-12)
        present = sum(-(-number // patch_size) for number in steps)
        future = network.config.num_future_patches(patch_size)
        variates = windows["past_target"].shape[-1] + sum(
            windows[name].shape[-1] for name in ("feat_dynamic_real",) if name in windows
        )
        past_only = windows.get("past_feat_dynamic_real", torch.empty(0, 0)).shape[-1]
        # No token tells what follows the window.
        told = (present + NUMBER * (future - 1)) * variates + present * past_only
        for name, routing in packed.routings.items():
            apart = [_counted(window.routings[name]) for window in alone[::2]]
            together = Routing(*(torch.cat(parts) for parts in zip(*apart, strict=True)))
            assert len(together.ids_TK) == told
            torch.testing.assert_close(balance_loss(routing), balance_loss(together))


def _counted(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids, scores, counted = routing
    if counted is None:
        counted = torch.ones(ids.shape[:-1], dtype=torch.bool)
    return weights[counted], ids[counted], scores[counted]


def test_what_another_window_holds_moves_no_loss() -> None:
    network = network_of(context_length=CONTEXT, target_dim=2, **COVARIATES)
    windows = windows_of(network, [3, 26, 9, 12, 1, 20, 5], torch.float32)
    with torch.no_grad():
        before, _ = network.window_losses(windows, PATCH)
        for changed in range(NUMBER):
            other = {name: tensor.clone() for name, tensor in windows.items()}
            for tensor in other.values():
                tensor[changed] *= -2.0
            other["past_observed_values"][changed] /= -2.0
            other["future_observed_values"][changed] /= -2.0
            losses, _ = network.window_losses(other, PATCH)
            moved = (losses - before).abs() > 1e-4
            assert moved.nonzero().flatten().tolist() == [changed]


@pytest.mark.parametrize("features", [False, True])
def test_experts_of_a_forecast_do_not_depend_on_the_padding_before_it(features: bool) -> None:
    entries = series(number=3, length=10, features=features, beyond=LONG)
    assert max(len(entry["target"]) for entry in entries) <= 6 * PATCH
    short, long = (
        predictor_of(context_length=patches * PATCH, **(FEATURES if features else {}))
        for patches in (6, 9)
    )
    long.network.load_state_dict(short.network.state_dict())
    told = []
    for predictor in (short, long):
        predictor.reports_routing = True
        of_each = [forecast.info["expert_weights"] for forecast in predictor.predict(entries)]
        told.append([*of_each, predictor.expert_usage.weight_share])
    for of_short, of_long in zip(*told, strict=True):
        assert set(of_short) == set(short.network.mixtures())
        for router, shares in of_short.items():
            np.testing.assert_allclose(shares, of_long[router], atol=1e-5)
