"""Plots of forecasts."""

from __future__ import annotations

from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, Mapping, Optional, Sequence, Union

import numpy as np
import pandas as pd
from gluonts.dataset.field_names import FieldName
from gluonts.dataset.split import TestData
from gluonts.model import Forecast

from .errors import EvaluationError
from .metrics import interval_quantiles
from .tables import PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without black, which is the series, and yellow, too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANEL_INCHES = (4.2, 2.6)
_WIDEST_ALPHA, _NARROWEST_ALPHA = 0.15, 0.45


def require_matplotlib() -> None:
    """Say how to get matplotlib if it is missing, before anything is computed for a plot.

    Raises
    ------
    EvaluationError
        If it is missing.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise EvaluationError(
            "plots need matplotlib; install it with: pip install 'moecast[plots]'."
        ) from error


def plot_forecasts(
    forecasts: Union[Iterable[Forecast], Mapping[str, Iterable[Forecast]]],
    test_data: TestData,
    *,
    history_length: Optional[int] = None,
    intervals: Sequence[float] = (0.5, 0.8, 0.95),
    max_windows: int = 6,
    max_channels: int = 4,
    columns: int = 3,
    title: Optional[str] = None,
    path: Optional[PathLike] = None,
) -> Figure:
    """Draw forecasts as fans over the last stretch of history, one panel per window and channel.

    Parameters
    ----------
    forecasts
        Forecasts of `test_data`'s windows in order, such as a result's `forecasts`; or those of
        several forecasters by name, drawn side by side on equal scales.
    test_data
        The windows.
    history_length
        Steps of history drawn, by default three horizons.
    intervals
        Levels of the central intervals.
    max_windows
        Number of windows drawn, spread evenly over `test_data`.
    max_channels
        Number of channels drawn of a multivariate forecast.
    columns
        Panels per row, unless several forecasters are side by side.
    title
        Title of the figure.
    path
        File to save the figure in; its ending says the format.

    Returns
    -------
    matplotlib.figure.Figure
        Not tied to pyplot, so it needs neither a display nor closing.

    Raises
    ------
    EvaluationError
        matplotlib is missing, there is nothing to draw, or a level is not between 0 and 1.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for level in intervals:
        if not 0 < level < 1:
            raise EvaluationError(f"intervals: {level} must lie between 0 and 1.")

    named = forecasts if isinstance(forecasts, Mapping) else {"forecast": forecasts}
    chosen = _spread(len(test_data), max_windows)
    windows = _pick(test_data, chosen)
    drawn = {name: _pick(own, chosen) for name, own in named.items()}
    if not windows or not all(len(own) == len(windows) for own in drawn.values()) or not drawn:
        raise EvaluationError(
            "there is no forecast for some of the windows; pass one per window (for a backtest: "
            "keep_forecasts=True)."
        )
    panels = [
        (window, channel)
        for window in range(len(windows))
        for channel in range(min(_num_channels(windows[window][1]), max_channels))
    ]
    side_by_side = len(drawn) > 1
    width = len(drawn) if side_by_side else min(columns, len(panels))
    height = -(-len(panels) * len(drawn) // width)
    figure = Figure(
        figsize=(_PANEL_INCHES[0] * width, _PANEL_INCHES[1] * height + 0.6), layout="constrained"
    )
    axes = figure.subplots(
        height, width, squeeze=False, sharey="row" if side_by_side else False
    ).ravel()
    cells = [(panel, name) for panel in panels for name in drawn]
    for axis, ((window, channel), name) in zip(axes, cells):
        colour = COLOURS[list(drawn).index(name) % len(COLOURS)]
        past, label = windows[window]
        forecast = drawn[name][window]
        _draw_panel(axis, past, label, forecast, channel, intervals, colour, history_length)
        item = past.get(FieldName.ITEM_ID, window)
        suffix = f" [{channel}]" if _num_channels(label) > 1 else ""
        axis.set_title(f"{item}{suffix}" + (f" · {name}" if side_by_side else ""), fontsize=10)
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    legend_colour = "0.4" if side_by_side else COLOURS[0]
    handles = [
        Line2D([], [], color="black", linewidth=1, label="observed"),
        Line2D([], [], color=legend_colour, linewidth=1.6, label="median forecast"),
        *(
            Patch(color=legend_colour, alpha=alpha, linewidth=0, label=f"{level:.0%} interval")
            for level, alpha in _shades(intervals)
        ),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _draw_panel(
    axis: Axes,
    past: dict[str, Any],
    label: dict[str, Any],
    forecast: Forecast,
    channel: int,
    intervals: Sequence[float],
    colour: str,
    history_length: Optional[int],
) -> None:
    horizon = forecast.prediction_length
    history = 3 * horizon if history_length is None else history_length
    future_target = np.atleast_2d(label[FieldName.TARGET])[channel]
    target = np.atleast_2d(past[FieldName.TARGET])[channel][-history:] if history else []
    series = np.concatenate([target, future_target])
    start = forecast.start_date
    shown = pd.period_range(end=start + horizon - 1, periods=len(series), freq=start.freq)
    axis.plot(shown.to_timestamp(), series, color="black", linewidth=1, zorder=3)

    future = pd.period_range(start, periods=horizon, freq=start.freq).to_timestamp()
    for level, alpha in _shades(intervals):
        lower, upper = (_at(forecast.quantile(q), channel) for q in interval_quantiles(level))
        axis.fill_between(future, lower, upper, color=colour, alpha=alpha, linewidth=0)
    axis.plot(future, _at(forecast.quantile(0.5), channel), color=colour, linewidth=1.6)
    axis.axvline(
        future[0],  # type: ignore[arg-type]
        color="0.6",
        linewidth=0.8,
        linestyle=":",
    )
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=6)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.get_offset_text().set_fontsize(8)
    axis.margins(x=0.01)


def _shades(intervals: Sequence[float]) -> list[tuple[float, float]]:
    """Levels with their opacity, the widest interval first and palest."""
    levels = sorted(intervals, reverse=True)
    return list(zip(levels, np.linspace(_WIDEST_ALPHA, _NARROWEST_ALPHA, len(levels)).tolist()))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` distinct indexes below `count`, evenly spaced, the first and last included."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _pick(items: Iterable[Any], chosen: Sequence[int]) -> list[Any]:
    wanted = set(chosen)
    last = max(chosen, default=-1)
    return [item for index, item in enumerate(islice(items, last + 1)) if index in wanted]


def _num_channels(label: dict[str, Any]) -> int:
    return len(np.atleast_2d(label[FieldName.TARGET]))


def _at(values: np.ndarray, channel: int) -> np.ndarray:
    return values if values.ndim == 1 else values[:, channel]
