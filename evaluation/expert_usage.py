"""Which expert is heard when: usage over the windows of a data set, by time of day and series.

Works with any predictor that has `reports_routing`, by which each forecast's `info` tells its
"expert_weights", and `expert_usage` with the `chosen_share` of its last `predict`, as the
predictors of moecast do.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from .datasets import Entry
from .errors import EvaluationError

_OF_START: Mapping[str, Callable[[pd.Period], Any]] = {
    "hour": lambda start: start.hour,
    "weekday": lambda start: calendar.day_abbr[start.dayofweek],
    "month": lambda start: calendar.month_abbr[start.month],
}
_ORDERS: Mapping[str, Sequence[Any]] = {
    "hour": range(24),
    "weekday": tuple(calendar.day_abbr),
    "month": tuple(calendar.month_abbr)[1:],
}
GROUPINGS = (*_OF_START, "series")


@dataclass(frozen=True)
class Window:
    """The past of a window, as a predictor takes it, and when its forecast begins."""

    entry: Entry
    start: pd.Period


def draw_windows(
    entries: Sequence[Entry],
    prediction_length: int,
    context_length: int,
    count: int,
    seed: int = 0,
) -> list[Window]:
    """Windows drawn evenly from all that have a full context and whose horizon is in the data.

    Parameters
    ----------
    entries
        Series with targets [T] or [C, T].
    prediction_length, context_length
        Steps of the horizon and of the context.
    count
        Number of windows; all where there are fewer.
    seed
        Of the drawing.

    Raises
    ------
    EvaluationError
        No series has a window.
    """
    lengths = np.array([entry["target"].shape[-1] for entry in entries])
    eligible = np.maximum(lengths - prediction_length - context_length + 1, 0)
    total = int(eligible.sum())
    if total == 0:
        raise EvaluationError(
            f"no series has the {context_length + prediction_length} steps of a window (context "
            f"and horizon), the longest has {lengths.max()}; give longer series."
        )
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(total, size=min(count, total), replace=False))
    begins = np.concatenate([[0], np.cumsum(eligible)])
    windows = []
    for number in chosen:
        series = int(np.searchsorted(begins, number, side="right")) - 1
        end = context_length + int(number - begins[series])
        windows.append(_cut(entries[series], end, prediction_length))
    return windows


def _cut(entry: Entry, end: int, prediction_length: int) -> Window:
    cut = {**entry, "target": entry["target"][..., :end]}
    if "past_feat_dynamic_real" in entry:
        cut["past_feat_dynamic_real"] = entry["past_feat_dynamic_real"][:, :end]
    if "feat_dynamic_real" in entry:
        cut["feat_dynamic_real"] = entry["feat_dynamic_real"][:, : end + prediction_length]
    return Window(cut, entry["start"] + end)


@dataclass(frozen=True, eq=False)
class WindowUsage:
    """How much each expert was heard, by router.

    Parameters
    ----------
    weight_share
        Mean share of each expert in the mixtures of a window's tokens [W, E]; rows sum to 1.
    chosen_share
        Share of the tokens of all windows that chose each expert [E].
    """

    weight_share: Mapping[str, np.ndarray]
    chosen_share: Mapping[str, np.ndarray]


def window_usage(predictor: Any, windows: Iterable[Window]) -> WindowUsage:
    """Forecast the windows, and keep what the forecasts say of the predictor's experts.

    Raises
    ------
    EvaluationError
        The predictor has no experts.
    """
    weights: dict[str, list[np.ndarray]] = {}
    before, predictor.reports_routing = predictor.reports_routing, True
    try:
        entries = (window.entry for window in windows)
        for forecast in predictor.predict(entries, num_samples=1):
            for router, share in ((forecast.info or {}).get("expert_weights") or {}).items():
                weights.setdefault(router, []).append(share)
    finally:
        predictor.reports_routing = before
    if not weights:
        raise EvaluationError("the model has no experts to look at; take one with several.")
    return WindowUsage(
        {router: np.stack(shares) for router, shares in weights.items()},
        predictor.expert_usage.chosen_share,
    )


def expert_shares(usage: WindowUsage, windows: Sequence[Window], by: str = "all") -> pd.DataFrame:
    """How much each expert is heard, over all windows or by what these have in common.

    Parameters
    ----------
    usage, windows
        Of `window_usage` and the windows it was given.
    by
        `"all"`, or one of `GROUPINGS`: the hour, weekday or month in which the forecast begins,
        or the series.

    Returns
    -------
    pandas.DataFrame
        A row per group, router and expert: by, group, windows (how many the group has), router,
        expert (from 0), weight_share (its mean over the windows) and, over all windows,
        chosen_share.

    Raises
    ------
    EvaluationError
        `by` is unknown.
    """
    if by not in ("all", *GROUPINGS):
        raise EvaluationError(f"by={by!r} is unknown; choose among {', '.join(GROUPINGS)}.")
    groups: dict[Any, list[int]] = {}
    for number, window in enumerate(windows):
        if by == "series":
            group = str(window.entry["item_id"])
        else:
            group = "all" if by == "all" else _OF_START[by](window.start)
        groups.setdefault(group, []).append(number)
    order = list(_ORDERS.get(by, groups))
    rows = []
    for group in sorted(groups, key=order.index):
        members = groups[group]
        for router, shares in usage.weight_share.items():
            for expert, weight in enumerate(shares[members].mean(axis=0).tolist()):
                row = (by, group, len(members), router, expert, weight)
                rows.append((*row, usage.chosen_share[router][expert]) if by == "all" else row)
    names = ["by", "group", "windows", "router", "expert", "weight_share", "chosen_share"]
    return pd.DataFrame(rows, columns=names if by == "all" else names[:-1])


def specialisation(shares: pd.DataFrame) -> pd.DataFrame:
    """How far the mixtures of groups are from that of all their windows.

    Parameters
    ----------
    shares
        Of `expert_shares` with one grouping or several, one below the other.

    Returns
    -------
    pandas.DataFrame
        A row per grouping and router: by, router, distance. The distance is the total variation
        (half the sum of absolute differences of weight shares) between a group's mixture and the
        mean mixture, averaged over windows: 0 where all groups hear the same experts, at most 1.
        Groups of few windows differ by chance, too.
    """
    rows = []
    for (by, router), part in shares.groupby(["by", "router"], sort=False):
        table = part.pivot(index="group", columns="expert", values="weight_share")
        windows = part.groupby("group")["windows"].first().loc[table.index].to_numpy()
        mixtures, weights = table.to_numpy(), windows / windows.sum()
        mean = weights @ mixtures
        distance = 0.5 * np.abs(mixtures - mean).sum(axis=1) @ weights
        rows.append((by, router, float(distance)))
    return pd.DataFrame(rows, columns=["by", "router", "distance"])
