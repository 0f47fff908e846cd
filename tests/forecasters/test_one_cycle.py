from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moecast.forecasters.lightning_module import OptimizerConfig, one_cycle_factor


def test_the_factor_follows_torchs_one_cycle_schedule() -> None:
    """torch reaches its peak at step 0.3 * total - 1 and the end at total - 1: all but the same."""
    total = 4000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total, pct_start=0.3, div_factor=25, final_div_factor=1e12
    )
    for step in range(total):
        assert one_cycle_factor(step / total) == pytest.approx(scheduler.get_last_lr()[0], abs=2e-3)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_its_corners() -> None:
    assert one_cycle_factor(0.0) == pytest.approx(1 / 25)
    assert one_cycle_factor(0.15) == pytest.approx((1 + 1 / 25) / 2)
    assert one_cycle_factor(0.3) == pytest.approx(1.0)
    assert one_cycle_factor(0.65) == pytest.approx(0.5)
    assert one_cycle_factor(1.0) == pytest.approx(0.0, abs=1e-12)
    assert one_cycle_factor(1.5) == pytest.approx(0.0, abs=1e-12)


@given(st.floats(0, 1.2), st.floats(0, 1.2))
def test_it_rises_once_and_falls_once(one: float, other: float) -> None:
    first, second = sorted((one, other))
    if second <= 0.3:
        assert one_cycle_factor(first) <= one_cycle_factor(second)
    elif first >= 0.3:
        assert one_cycle_factor(first) >= one_cycle_factor(second)
    assert 0.0 <= one_cycle_factor(one) <= 1.0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"aux_weight": -1.0}, "aux_weight=-1.0 must not be negative"),
        ({"lr_schedule": "cosine"}, "lr_schedule='cosine' is unknown: choose one of one_cycle, c"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings_)
