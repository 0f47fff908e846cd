"""The report's section of forecasts: fans of the best, median and worst series."""

from __future__ import annotations

from itertools import islice
from typing import Any, Mapping, Sequence

import numpy as np

from .comparison import example_windows
from .diagnostics import FAN_LEVELS, Diagnostics
from .html_parts import Task, crps, shortened
from .svg import Content, Markup, Plot, Style, element, ticks

_MOST_PANELS = 60
_HORIZONS_OF_HISTORY = 2
_MOST_POINTS_OF_HISTORY = 200
# Levels of the fan's intervals with their opacity, the widest first.
_FAN_SHADES = ((0, 0.16), (1, 0.22), (2, 0.32))


def forecasts(tasks: Sequence[Task], styles: Mapping[str, Style]) -> Content:
    """Forecasts of the best, median and worst series of every data set; None without any."""
    known = [task for task in tasks if task.diagnosed]
    if not known:
        return None
    most = int(np.clip(_MOST_PANELS // (3 * len(known)), 2, 6))
    content: list[Content] = [
        element(
            "p",
            "Shaded: the central 40%, 80% and 95% intervals; coloured line: the median; black: "
            "what was observed. Of each data set the last window of the best, median and worst "
            "series of the forecaster with the lowest CRPS, by quantile loss in units of the "
            "seasonal error (of a single series its windows). What leaves a panel is cut at its "
            "edge.",
        )
    ]
    for task in known:
        by_name = dict(task.diagnosed)
        ranked = sorted(task.results_diagnosed, key=crps)
        shown = ranked[:most]
        if task.baseline in ranked and task.baseline not in shown:
            shown = [*shown[:-1], task.baseline]
        names = [r.model for r in task.results if r in shown]
        best = by_name[ranked[0].model]
        windows = example_windows(best)
        pairs = _pick_pairs(task.baseline.test_data, list(windows.values()))
        content.append(element("h3", task.name))
        if len(names) < len(ranked):
            content.append(element("p", f"Shown are {', '.join(names)}."))
        if len(best.drawable) < len(best.series):
            content.append(
                element(
                    "p",
                    f"Chosen among {len(best.drawable):,} of the {len(best.series):,} windows.",
                )
            )
        for place, window in windows.items():
            past, label = pairs[window]
            item = best.item_ids[int(best.series[window])]
            what = "series" if len(best.item_ids) > 1 else "window"
            content.append(
                element(
                    "h4",
                    f"{place.capitalize()} {what}: {item}, from {best.starts[window]}"
                    + (", first channel" if np.ndim(label["target"]) > 1 else ""),
                )
            )
            content.append(
                element(
                    "div",
                    _fans(past, label, [(n, by_name[n]) for n in names], window, styles),
                    class_="grid small",
                )
            )
    return content


def _pick_pairs(test_data: Any, windows: Sequence[int]) -> dict[int, tuple[Any, Any]]:
    last = max(windows)
    return {i: pair for i, pair in enumerate(islice(test_data, last + 1)) if i in set(windows)}


def _fans(
    past: Mapping[str, Any],
    label: Mapping[str, Any],
    known: Sequence[tuple[str, Diagnostics]],
    window: int,
    styles: Mapping[str, Style],
) -> list[Markup]:
    future = np.atleast_2d(np.asarray(label["target"], dtype=np.float64))[0]
    horizon = len(future)
    shown = min(_HORIZONS_OF_HISTORY * horizon, _MOST_POINTS_OF_HISTORY)
    history = np.atleast_2d(np.asarray(past["target"], dtype=np.float64))[0][-shown:]
    observed = np.concatenate([history, future])
    fans = {name: _fan(diagnostics, window) for name, diagnostics in known}
    reach = _reach(observed, list(fans.values()))
    before = len(history)
    plots = []
    for name, diagnostics in known:
        fan, style = np.clip(fans[name], *reach), styles[name]
        start = diagnostics.starts[window]
        plot = Plot(
            shortened(name, 30),
            f"forecast of {horizon} steps from {start}, with intervals",
            (-before, max(horizon - 1, 1)),
            reach,
            width=240,
            height=150,
            left=40,
        )
        plot.axis_y(ticks(*reach, 4))
        plot.axis_x([-before, 0], [_date(start - before), _date(start)])
        steps = np.arange(horizon)
        for row, opacity in _FAN_SHADES:
            plot.band(steps, fan[row], fan[-1 - row], style.colour, opacity)
        plot.polyline(steps, fan[len(FAN_LEVELS) // 2], stroke=style.colour, stroke_width=2)
        plot.polyline(
            np.arange(-before, horizon), np.clip(observed, *reach), stroke="#000", stroke_width=1.1
        )
        plots.append(plot.down(0, "now").render())
    return plots


def _fan(diagnostics: Diagnostics, window: int) -> np.ndarray:
    """Quantiles [7, H] of a window that can be drawn, of its first channel."""
    kept = diagnostics.fans[int(np.searchsorted(diagnostics.drawable, window))]
    return (kept if kept.ndim == 2 else kept[..., 0]).astype(np.float64)


def _reach(observed: np.ndarray, fans: Sequence[np.ndarray]) -> tuple[float, float]:
    """Range of the y axis: all that was observed, and fans as far as they do not dwarf it."""
    known = observed[np.isfinite(observed)]
    if not len(known):
        known = np.concatenate([fan.ravel() for fan in fans])
    lowest, highest = float(known.min()), float(known.max())
    room = (highest - lowest) or abs(highest) or 1.0
    for fan in fans:
        lowest = min(lowest, max(float(fan.min()), float(known.min()) - room))
        highest = max(highest, min(float(fan.max()), float(known.max()) + room))
    margin = 0.04 * ((highest - lowest) or 1.0)
    return lowest - margin, highest + margin


def _date(period: Any) -> str:
    unit = period.freq.name.split("-")[0]
    if unit in ("h", "H", "min", "T", "s", "S"):
        return period.strftime("%d %b %H:%M")
    return period.strftime(
        "%b %Y" if unit in ("M", "ME", "Q", "QE", "Y", "A", "YE") else "%d %b %Y"
    )
