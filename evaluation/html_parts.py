"""What the sections of the HTML report share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Optional, Sequence

import numpy as np

from .backtest import BacktestResult
from .diagnostics import Diagnostics
from .svg import Content, Markup, element

# Columns that are aligned on the left.
_TEXT_COLUMNS = ("data set", "forecaster", "baseline", "patch size in steps: windows")


@dataclass(frozen=True)
class Task:
    """The results of one data set and horizon.

    Parameters
    ----------
    name
        Name of the data set, with the horizon where it has several.
    results
        Results of all forecasters.
    baseline
        The one that others are compared with.
    """

    name: str
    results: tuple[BacktestResult, ...]
    baseline: BacktestResult

    @property
    def results_diagnosed(self) -> list[BacktestResult]:
        """The results that have diagnostics."""
        return [result for result in self.results if result.diagnostics is not None]

    @property
    def diagnosed(self) -> list[tuple[str, Diagnostics]]:
        """Forecasters that have diagnostics, with them."""
        return [(r.model, r.diagnostics) for r in self.results if r.diagnostics is not None]


def section(name: str, heading: str, content: Content) -> Markup:
    """A section with its heading."""
    return element(
        "section",
        element("h2", heading, id=f"{name}-heading"),
        content,
        id=name,
        aria_labelledby=f"{name}-heading",
    )


def data_table(
    caption: str,
    headers: Sequence[str],
    rows: Iterable[Content],
    class_: Optional[str] = None,
) -> Markup:
    """A table that scrolls on its own where the page is narrow.

    Parameters
    ----------
    caption
        What it shows.
    headers
        Names of the columns; no row of headers where all are empty.
    rows
        Cells of every row, `th` and `td` elements.
    class_
        Class of the table.
    """
    head = None
    if any(headers):
        cells = [
            element("th", header, scope="col", class_="text" if header in _TEXT_COLUMNS else None)
            for header in headers
        ]
        head = element("thead", element("tr", cells))
    body = element("tbody", [element("tr", cells) for cells in rows])
    table = element("table", element("caption", caption), head, body, class_=class_)
    return element("div", table, class_="scroll", role="region", aria_label=caption, tabindex="0")


def crps(result: BacktestResult) -> float:
    """CRPS of a result with diagnostics; NaN where there is nothing to divide by."""
    assert result.diagnostics is not None
    total = result.diagnostics.absolute_label.sum()
    return float(result.diagnostics.quantile_loss.sum() / total) if total else np.nan


def shortened(name: str, most: int = 16) -> str:
    """A name with at most so many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
