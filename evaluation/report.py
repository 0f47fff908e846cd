"""Tables of results: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Optional, Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from .backtest import BacktestResult
from .errors import EvaluationError
from .metrics import CRPS, metric_score
from .tables import PathLike

_CRPS_NAME = CRPS(axis=None).name
_HEADLINES = ("MASE[0.5]", _CRPS_NAME, "MSIS", "ND[0.5]", "coverage[0.8]", "MSE", "MAE", "CORR")
_TITLES = {
    _CRPS_NAME: "CRPS",
    "MASE[0.5]": "MASE",
    "ND[0.5]": "ND",
    "coverage[0.8]": "in 80%",
    "train_seconds": "train s",
    "predict_seconds": "pred. s",
}
_KEYS = ["dataset", "horizon", "forecaster"]
_SECONDS = ["train_seconds", "predict_seconds"]


def results_frame(
    results: Iterable[BacktestResult], metrics: Optional[Sequence[str]] = None
) -> pd.DataFrame:
    """One row per data set and forecaster.

    Parameters
    ----------
    results
        The results, in the order of the rows.
    metrics
        Names of metrics, in the order of the columns; by default the usual ones among those the
        results have.

    Returns
    -------
    pandas.DataFrame
        Columns dataset, horizon, forecaster, the metrics, train_seconds, predict_seconds. A metric
        that a result does not have is NaN.

    Raises
    ------
    EvaluationError
        There is no result, or none has a metric asked for.
    """
    results = list(results)
    if not results:
        raise EvaluationError("there is no result to report; run a backtest first.")
    known = list(dict.fromkeys(name for result in results for name in result.metrics))
    if metrics is None:
        metrics = [name for name in _HEADLINES if name in known] or known
    for name in metrics:
        if name not in known:
            raise EvaluationError(
                f"no result has the metric {name!r}; choose among {', '.join(known)}."
            )
    rows = [
        [
            result.dataset,
            result.prediction_length,
            result.model,
            *(result.metrics.get(name, np.nan) for name in metrics),
            result.train_seconds,
            result.predict_seconds,
        ]
        for result in results
    ]
    return pd.DataFrame(rows, columns=[*_KEYS, *metrics, *_SECONDS])


def best_per_dataset(frame: pd.DataFrame) -> pd.DataFrame:
    """Which cells of a `results_frame` are the best of their data set, horizon and metric.

    Ties are all best. Where there is only one forecaster, none is.

    Returns
    -------
    pandas.DataFrame
        Booleans of the frame's shape without the first three and last two columns.
    """
    values = frame.drop(columns=[*_KEYS, *_SECONDS])
    scores = values.apply(lambda column: column.map(lambda x: metric_score(str(column.name), x)))
    groups = scores.groupby([frame["dataset"], frame["horizon"]])
    return (scores == groups.transform("min")) & (groups.transform("count") > 1)


def results_table(
    results: Iterable[BacktestResult], metrics: Optional[Sequence[str]] = None
) -> Table:
    """A `rich` table of the results, the best of each data set and metric in bold green.

    Parameters and errors are `results_frame`'s.
    """
    frame = results_frame(results, metrics)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in frame.columns:
        text = name in ("dataset", "forecaster")
        table.add_column(
            column_title(name),
            justify="left" if text else "right",
            no_wrap=not text,
            overflow="fold",
        )
    previous = None
    for dataset, cells in zip(frame["dataset"], _cells(frame, "[bold green]{}[/]")):
        if previous not in (None, dataset):
            table.add_section()
        table.add_row(*cells)
        previous = dataset
    return table


def write_results(
    results: Iterable[BacktestResult], path: PathLike, metrics: Optional[Sequence[str]] = None
) -> None:
    """Write the results as a table, CSV or Markdown by the ending of `path` (`.csv`, `.md`).

    CSV has all digits and every metric the results have unless `metrics` says otherwise; Markdown
    is rounded, the best of each data set bold.

    Raises
    ------
    EvaluationError
        The ending is another one, or what `results_frame` raises.
    """
    path = Path(path)
    results = list(results)
    if path.suffix == ".csv":
        if metrics is None:
            metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
        results_frame(results, metrics).to_csv(path, index=False)
    elif path.suffix == ".md":
        path.write_text(results_markdown(results, metrics), encoding="utf-8")
    else:
        raise EvaluationError(f"{path.name}: a table is written as .csv or .md; rename the file.")


def results_markdown(
    results: Iterable[BacktestResult], metrics: Optional[Sequence[str]] = None
) -> str:
    """The results as a Markdown table, the best of each data set and metric in bold.

    Parameters and errors are `results_frame`'s.
    """
    frame = results_frame(results, metrics)
    header = [column_title(name) for name in frame.columns]
    ruler = ["---" if name in ("dataset", "forecaster") else "---:" for name in frame.columns]
    lines = [header, ruler, *_cells(frame, "**{}**")]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def column_title(name: str) -> str:
    """What a table calls a column of a `results_frame`."""
    return _TITLES.get(name, name)


def _cells(frame: pd.DataFrame, highlight: str) -> list[list[str]]:
    best = best_per_dataset(frame)
    rows = []
    for index in range(len(frame)):
        cells = []
        for name in frame.columns:
            text = cell_text(name, frame[name].iloc[index])
            is_best = name in best.columns and bool(best[name].iloc[index])
            cells.append(highlight.format(text) if is_best else text)
        rows.append(cells)
    return rows


def cell_text(name: str, value: object) -> str:
    """A value of a column of a `results_frame` as a table shows it."""
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):
        return "–"
    return f"{value:.1f}" if name in _SECONDS else f"{value:.4g}"
