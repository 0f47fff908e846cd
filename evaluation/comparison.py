"""How forecasters compare on the same windows, and how routing depends on a window's calendar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Hashable, Literal, Optional, Sequence

import numpy as np

from .backtest import BacktestResult
from .diagnostics import Diagnostics
from .errors import EvaluationError

ScoreName = Literal["CRPS", "MASE"]

_NUMBERS_AT_ONCE = 4_000_000
_ENOUGH_SERIES = 2


@dataclass(frozen=True)
class RelativeScore:
    """One forecaster's score divided by another's, with an interval from the bootstrap.

    Parameters
    ----------
    value
        The ratio; below 1 the first forecaster is better.
    lower, upper
        Ends of the interval.
    resampled
        What was drawn with replacement: `"series"`, or `"windows"` where there is only one series.
    count
        How many of them there are.
    """

    value: float
    lower: float
    upper: float
    resampled: Literal["series", "windows"]
    count: int


def relative_score(
    diagnostics: Diagnostics,
    baseline: Diagnostics,
    score: ScoreName = "CRPS",
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> RelativeScore:
    """A forecaster's score over all windows, divided by a baseline's on the same windows.

    The interval is the percentile bootstrap's (Efron, 1979) over series: all windows of a series
    are drawn together, and both forecasters on the same draws. A single series has its windows
    drawn, as if each told something of its own. The order of the series has no influence.

    Parameters
    ----------
    diagnostics, baseline
        Of the two forecasters.
    score
        `"CRPS"`, the ratio of sums of quantile losses; or `"MASE"`.
    level
        Level of the interval.
    draws, seed
        Number of bootstrap draws, and the seed of their random numbers.

    Raises
    ------
    EvaluationError
        The two were not computed on the same windows.
    """
    check_same_windows(diagnostics, baseline)
    names = {"CRPS": ("quantile_loss", "absolute_label"), "MASE": ("scaled_error", "scaled")}
    parts: list[np.ndarray] = [
        np.asarray(getattr(one, name), dtype=np.float64)
        for one in (diagnostics, baseline)
        for name in names[score]
    ]
    resampled: Literal["series", "windows"] = "windows"
    if len(diagnostics.item_ids) >= _ENOUGH_SERIES:
        resampled = "series"
        parts = [np.bincount(diagnostics.series, part) for part in parts]
    units = np.stack(parts, axis=1)
    units = units[np.lexsort(units.T)]
    value = _ratio(units.sum(axis=0))

    count = len(units)
    generator = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // count)
    ratios = np.concatenate(
        [
            _ratio(
                generator.multinomial(
                    count, np.full(count, 1 / count), size=min(at_once, draws - done)
                )
                @ units
            )
            for done in range(0, draws, at_once)
        ]
    )
    ratios = ratios[np.isfinite(ratios)]
    tail = (1 - level) / 2
    ends = np.quantile(ratios, [tail, 1 - tail]) if len(ratios) else np.full(2, np.nan)
    return RelativeScore(float(value), float(ends[0]), float(ends[1]), resampled, count)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(a / b) / (c / d) of sums [..., 4], NaN where that is 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


def check_same_windows(one: Diagnostics, other: Diagnostics) -> None:
    """Refuse to compare forecasters on different labels.

    Raises
    ------
    EvaluationError
        If they are.
    """
    if one.absolute_label.shape != other.absolute_label.shape or not np.allclose(
        one.absolute_label, other.absolute_label, rtol=1e-6
    ):
        raise EvaluationError(
            "two results of one data set and horizon were computed on different windows; backtest "
            "both with the same series, windows and distance."
        )


def find_baseline(results: Sequence[BacktestResult], baseline: Optional[str]) -> BacktestResult:
    """The result that others are divided by: the one named, else Seasonal Naive, else the first.

    Raises
    ------
    EvaluationError
        None has that name.
    """
    by_name = {result.model: result for result in results}
    if baseline is not None:
        if baseline not in by_name:
            raise EvaluationError(
                f"baseline={baseline!r} was not evaluated on {results[0].dataset}; choose among "
                f"{', '.join(by_name)}."
            )
        return by_name[baseline]
    naive = [
        result
        for result in results
        if re.sub(r"[^a-z]", "", result.model.lower()).startswith("seasonalnaive")
    ]
    return naive[0] if naive else results[0]


def example_windows(diagnostics: Diagnostics) -> dict[str, int]:
    """The windows to draw: the last of the best, median and worst series, of those with a fan.

    Series are ordered by their mean quantile loss in units of the seasonal error, or of the mean
    |label| where no series has one.

    Returns
    -------
    dict
        Window by `"best"`, `"median"`, `"worst"`; of a single series its best, median and worst
        window; fewer where there are fewer than three.
    """
    loss, unit = diagnostics.scaled_loss, diagnostics.scaled.astype(np.float64)
    if not unit.any():
        loss, unit = diagnostics.quantile_loss, diagnostics.absolute_label
    drawable = diagnostics.drawable
    groups = diagnostics.series if len(diagnostics.item_ids) > 1 else np.arange(len(loss))
    totals, units = np.bincount(groups, loss), np.bincount(groups, unit)
    window_of = {int(groups[window]): int(window) for window in drawable}
    candidates = [group for group in window_of if units[group] > 0] or list(window_of)
    score = np.divide(totals, units, out=np.zeros_like(totals), where=units > 0)
    ranked = sorted(candidates, key=lambda group: (score[group], group))
    places = {"best": 0, "median": (len(ranked) - 1) // 2, "worst": len(ranked) - 1}
    chosen: dict[str, int] = {}
    for name, place in places.items():
        if window_of[ranked[place]] not in chosen.values():
            chosen[name] = window_of[ranked[place]]
    return chosen


def explained_share(weights: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Share of the variation of expert weights that a grouping of the windows explains.

    Adjusted for the number of groups (ε², Kelley 1935), so that a grouping at random explains
    about 0; 1 where all windows of a group have the same weights. NaN where there are fewer than
    two groups, hardly more windows than groups, or no variation.

    Parameters
    ----------
    weights
        [W, E].
    groups
        The group of each window [W].
    """
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(codes)
    windows, count = len(codes), len(sizes)
    if count < 2 or windows < 2 * count:
        return np.nan
    deviations = weights.astype(np.float64) - weights.mean(axis=0, dtype=np.float64)
    total = np.square(deviations).sum()
    if total < 1e-12 * windows:
        return np.nan
    means = group_means(deviations, codes)
    within = np.square(deviations - means[codes]).sum()
    return float(np.clip(1 - within / total * (windows - 1) / (windows - count), 0.0, 1.0))


def group_means(weights: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Mean of the rows [W, E] of each group [groups, E], groups numbered from 0 without gaps."""
    sums = np.zeros((int(codes.max()) + 1, weights.shape[1]))
    np.add.at(sums, codes, weights)
    return sums / np.bincount(codes)[:, None]


def effective_experts(share: np.ndarray) -> float:
    """Exponential of the entropy of the shares [E]: E if all are equal, 1 if one has all."""
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
