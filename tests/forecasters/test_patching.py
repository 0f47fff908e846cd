from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moecast.forecasters.patching import (
    best_patch_sizes,
    candidate_patch_sizes,
    fold,
    resolve_patch_sizes,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(), (2,), (2, 3)]))
def test_fold_equals_a_loop(length: int, patch_size: int, leading: tuple[int, ...]) -> None:
    series = torch.arange(1.0, 1.0 + length).expand(*leading, length) * torch.arange(
        1.0, 1.0 + torch.Size(leading).numel()
    ).reshape(*leading, 1)
    folded = fold(series, patch_size)
    patches = -(-length // patch_size)
    assert folded.shape == (*leading, patch_size, patches)
    missing = patches * patch_size - length
    for phase in range(patch_size):
        for patch in range(patches):
            step = patch * patch_size + phase - missing
            expected = series[..., step] if step >= 0 else torch.zeros(leading)
            assert torch.equal(folded[..., phase, patch], expected)


def test_patches_of_one_step_change_nothing() -> None:
    series = torch.randn(2, 7)
    assert torch.equal(fold(series, 1), series.unsqueeze(-2))


# Woo et al. 2024, appendix B.1, with contexts long enough to leave every candidate in.
@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        (("Y", "A", "YE", "YE-MAR", "A-DEC", "AS", "YS"), (1, 2, 4, 8)),
        (("Q", "QE", "Q-DEC", "QS", "QE-JAN"), (1, 2, 4, 8)),
        (("M", "ME", "MS", "2M"), (8, 16, 32)),
        (("W", "W-SUN", "W-WED"), (16, 32)),
        (("D", "B"), (16, 32)),
        (("H", "h", "2H", "6h"), (32, 64)),
        (("T", "min", "10T", "15min"), (32, 64, 128)),
        (("S", "s", "10s"), (64, 128)),
    ],
)
def test_candidates_by_frequency(aliases: tuple[str, ...], expected: tuple[int, ...]) -> None:
    for alias in aliases:
        assert candidate_patch_sizes(alias, 1000) == expected


@given(st.sampled_from(["Y", "M", "D", "h", "min", "s"]), st.integers(1, 400))
def test_two_patches_of_every_candidate_fit_into_the_context(freq: str, context: int) -> None:
    candidates = candidate_patch_sizes(freq, context)
    assert list(candidates) == sorted(candidates)
    assert all(2 * size <= context for size in candidates)
    left_out = set(candidate_patch_sizes(freq, 10000)) - set(candidates)
    assert all(2 * size > context for size in left_out)


def test_no_candidates_below_one_second() -> None:
    with pytest.raises(ValueError, match=r"freq='ms' has no patch-size candidates: give patch_si"):
        candidate_patch_sizes("ms", 100)


def test_resolved_sizes() -> None:
    assert resolve_patch_sizes("auto", "h", 128) == (1, 32, 64)
    assert resolve_patch_sizes("auto", "Y", 16) == (1, 2, 4, 8)
    assert resolve_patch_sizes("auto", "h", 10) == (1,)
    assert resolve_patch_sizes(7, "h", 7) == (7,)
    assert resolve_patch_sizes(7, "ms", 7) == (7,)
    assert resolve_patch_sizes([8, 2, 8, 4], "h", 10) == (2, 4, 8)
    assert resolve_patch_sizes((3, 1), "h", 10) == (1, 3)
    assert resolve_patch_sizes([5], None, 10) == resolve_patch_sizes(5, None, 10) == (5,)


def test_candidates_need_a_frequency() -> None:
    with pytest.raises(ValueError, match=r"patch_size='auto' needs freq, which is None: give one"):
        resolve_patch_sizes("auto", None, 64)


@pytest.mark.parametrize(
    ("patch_size", "message"),
    [
        (0, "patch_size=0 must lie between 1 and context_length=10"),
        (11, "patch_size=11 must lie between 1 and context_length=10"),
        ("all", "patch_size='all' must be a whole number or 'auto'"),
        (2.0, "patch_size=2.0 must be a whole number or 'auto'"),
        (True, "patch_size=True must be a whole number or 'auto'"),
        ([4, 0], "patch_size=0 must lie between 1 and context_length=10"),
        ([4, 11, 12], "patch_size=11 must lie between 1 and context_length=10"),
        ([4, 2.0], "patch_size=2.0 must be a whole number or 'auto'"),
        ([4, "auto"], "patch_size='auto' must be a whole number or 'auto'"),
        ([], r"patch_size=\[\] must hold at least one size"),
    ],
)
def test_impossible_sizes_are_refused(patch_size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_patch_sizes(patch_size, "h", 10)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses_by_size", "expected"),
    [
        ((3.0, 2.0, 1.0), 32),
        ((-3.0, -2.0, -1.0), 1),
        ((2.0, 1.0, 1.0), 16),
        ((NAN, 5.0, NAN), 16),
        ((INF, 5.0, NAN), 16),
        ((NAN, NAN, 1e30), 32),
        ((NAN, NAN, NAN), 1),
        ((INF, INF, INF), 1),
        ((NAN, INF, NAN), 1),
    ],
)
def test_the_smallest_held_out_loss_wins(losses_by_size: tuple, expected: int) -> None:
    losses = [torch.tensor([loss, 0.0]) for loss in losses_by_size]
    assert best_patch_sizes(losses, (1, 16, 32)) == [expected, 1]
