"""The report's sections about mixtures of experts: who was heard when, and patch sizes."""

from __future__ import annotations

from typing import Any, Callable, Hashable, Mapping, Optional, Sequence

import numpy as np
import pandas as pd

from .comparison import effective_experts, explained_share, group_means
from .diagnostics import Diagnostics
from .html_parts import Task, data_table
from .svg import Content, Markup, element

_MOST_SERIES = 12
_HOURS, _DAYS = 24, 7
_DAY = pd.Timedelta(days=1)
# White to Okabe and Ito's blue.
_LIGHT, _DARK = np.array([255, 255, 255]), np.array([0, 114, 178])
_WHITE_TEXT_FROM = 0.7


def experts(tasks: Sequence[Task]) -> Content:
    """How much every expert was heard, and what that depends on; None if no forecaster tells."""
    parts: list[Content] = []
    for task in tasks:
        for name, diagnostics in task.diagnosed:
            shares = _shares(diagnostics)
            if shares:
                parts += [
                    element("h3", f"{name} on {task.name}"),
                    _usage(name, task, shares, diagnostics),
                ]
    if not parts:
        return None
    note = (
        "Shares of the experts in the mixtures, in percent, means over the test windows; each row "
        "of a router sums to 100. Effective experts: the exponential of the shares’ entropy, 1 if "
        "one expert has all. Explained: how much of the variation of a window’s shares a grouping "
        "of the windows explains, adjusted for the number of groups, so that a random grouping "
        "explains about 0; – where there are too few windows or nothing varies. Hour, weekday and "
        "month are those of the first step forecast. The tables by group are of the router that "
        "the grouping explains best."
    )
    return [element("p", note), parts]


def _shares(diagnostics: Diagnostics) -> dict[str, np.ndarray]:
    """Mean share of each expert by router, of routers with a choice."""
    shares = dict(diagnostics.expert_share)
    for router, weights in diagnostics.expert_weights.items():
        shares.setdefault(router, weights.mean(axis=0))
    return {router: share for router, share in shares.items() if len(share) > 1}


def _usage(
    name: str, task: Task, shares: Mapping[str, np.ndarray], diagnostics: Diagnostics
) -> list[Markup]:
    weights = {r: w for r, w in diagnostics.expert_weights.items() if r in shares}
    groupings = _groupings(diagnostics, task.baseline.freq) if weights else {}
    explained = {
        router: {kind: explained_share(w, groups) for kind, groups in groupings.items()}
        for router, w in weights.items()
    }
    width = max(len(share) for share in shares.values())
    numbers = [str(expert) for expert in range(width)]
    rows = []
    for router, share in shares.items():
        cells: list[Content] = [element("th", router, scope="row"), _heat_cells(share, width)]
        cells.append(element("td", f"{effective_experts(share):.1f}"))
        cells += [
            element("td", _percent(explained.get(router, {}).get(kind, np.nan)))
            for kind in groupings
        ]
        rows.append(cells)
    headers = ["router", *numbers, "effective", *(f"by {kind}" for kind in groupings)]
    usage = data_table(f"{name} on {task.name}: experts of each router", headers, rows, "heat")
    tables = []
    for kind, groups in groupings.items():
        router = max(explained, key=lambda r: np.nan_to_num(explained[r][kind], nan=-1.0))
        tables.append(_by_group(kind, groups, router, weights[router]))
    return [usage, element("div", tables, class_="tables")] if tables else [usage]


def _by_group(kind: str, groups: Sequence[Hashable], router: str, weights: np.ndarray) -> Markup:
    labels, codes = np.unique(np.asarray(groups), return_inverse=True)
    means = group_means(weights, codes)
    chosen = np.arange(len(labels))
    caption = f"Experts of {router} by {kind}"
    if len(labels) > max(_HOURS, _MOST_SERIES):
        chosen = np.linspace(0, len(labels) - 1, _MOST_SERIES).round().astype(int)
        caption += f", {_MOST_SERIES} of {len(labels):,}"
    rows = [
        [
            element("th", _group_name(kind, labels[i]), scope="row"),
            _heat_cells(means[i], len(means[i])),
        ]
        for i in chosen
    ]
    numbers = [str(expert) for expert in range(weights.shape[1])]
    return data_table(caption, [kind, *numbers], rows, "heat")


def _groupings(diagnostics: Diagnostics, freq: str) -> dict[str, list[Any]]:
    """Groups of the windows that the frequency allows and of which there are several."""
    step = pd.Period("2000-01-03", freq=freq)
    length = (step + 1).start_time - step.start_time
    kinds: dict[str, Callable[[int], Any]] = {}
    starts = diagnostics.starts
    if length < _DAY:
        kinds["hour"] = lambda window: starts[window].hour
    if length <= _DAY:
        kinds["weekday"] = lambda window: starts[window].dayofweek
    elif length < 300 * _DAY:
        kinds["month"] = lambda window: starts[window].month
    kinds["series"] = lambda window: diagnostics.item_ids[int(diagnostics.series[window])]
    found = {
        kind: [group_of(window) for window in range(len(starts))]
        for kind, group_of in kinds.items()
    }
    return {kind: groups for kind, groups in found.items() if len(set(groups)) > 1}


def _group_name(kind: str, label: Any) -> str:
    if kind == "weekday":
        return ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[int(label)]
    if kind == "month":
        return pd.Timestamp(2000, int(label), 1).strftime("%b")
    return f"{int(label):02d} h" if kind == "hour" else str(label)


def _heat_cells(share: np.ndarray, width: int) -> list[Markup]:
    """One cell of each expert, darker the larger its share; blank where a router has fewer."""
    cells = []
    for value in share:
        depth = float(np.clip(value, 0.0, 1.0)) ** 0.5
        red, green, blue = (_LIGHT + depth * (_DARK - _LIGHT)).round().astype(int)
        colour = f"background:#{red:02x}{green:02x}{blue:02x}"
        if depth >= _WHITE_TEXT_FROM:
            colour += ";color:#fff"
        cells.append(element("td", f"{100 * value:.0f}", style=colour))
    return cells + [element("td")] * (width - len(share))


def _percent(share: float) -> str:
    return f"{share:.0%}" if np.isfinite(share) else "–"


def patch_sizes(tasks: Sequence[Task]) -> Content:
    """Which patch sizes windows were forecast with; None if no forecaster tells."""
    rows: list[list[Content]] = []
    for task in tasks:
        told = [(name, _patch_sizes(result)) for name, result in _named(task)]
        known = [(name, text) for name, text in told if text is not None]
        for i, (name, text) in enumerate(known):
            cells: list[Content] = []
            if i == 0:
                cells.append(element("th", task.name, scope="rowgroup", rowspan=len(known)))
            cells += [element("th", name, scope="row"), element("td", text, class_="text")]
            rows.append(cells)
    if not rows:
        return None
    headers = ["data set", "forecaster", "patch size in steps: windows"]
    return data_table("Patch sizes", headers, rows)


def _named(task: Task) -> list[tuple[str, Any]]:
    return [(result.model, result) for result in task.results]


def _patch_sizes(result: Any) -> Optional[str]:
    count = result.num_series * result.windows
    if result.diagnostics is not None and result.diagnostics.patch_sizes is not None:
        sizes, windows = np.unique(result.diagnostics.patch_sizes, return_counts=True)
        return ", ".join(
            f"{size}: {number:,} ({number / count:.0%})" for size, number in zip(sizes, windows)
        )
    # A predictor with a single size has nothing to choose and to tell of each window.
    network = getattr(result.predictor, "prediction_net", None)
    own: Sequence[int] = getattr(network, "patch_sizes", ())
    return f"{own[0]}: {count:,} (100%)" if len(own) == 1 else None
