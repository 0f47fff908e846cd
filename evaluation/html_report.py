"""The evaluation report: one HTML page that needs no server, no network and no other file."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional, Sequence

import numpy as np

from . import html_experts, html_forecasts
from .backtest import BacktestResult
from .comparison import (
    RelativeScore,
    check_same_windows,
    find_baseline,
    relative_score,
)
from .diagnostics import INTERVALS, PIT_BINS, Diagnostics
from .environment import describe_environment
from .errors import EvaluationError
from .html_parts import Task, crps, data_table, section, shortened
from .html_style import STYLE
from .report import best_per_dataset, cell_text, column_title, results_frame
from .svg import BASELINE_STYLE, Content, Markup, Plot, Style, element, swatch, ticks
from .tables import PathLike

FILE_NAME = "report.html"


def write_html_report(
    results: Sequence[BacktestResult],
    path: PathLike,
    *,
    command: Optional[str] = None,
    title: str = "Forecast evaluation",
    note: Optional[str] = None,
    baseline: Optional[str] = None,
    seed: int = 0,
) -> Path:
    """Write a report of backtests as one self-contained HTML page.

    It shows scores, scores relative to a baseline with bootstrap intervals, calibration, error by
    step, fans of the best, median and worst series, how experts were used, patch sizes, time and
    memory, and what the page was made with. A section without anything known is left out.

    Parameters
    ----------
    results
        Results of `backtest`, of one or more data sets and forecasters; those of one data set and
        horizon must be on the same windows.
    path
        A file ending in `.html`, or a folder in which `report.html` is written; made if missing.
    command
        The command that made the results, shown as it is.
    title, note
        Title of the page, and a paragraph below it.
    baseline
        Name of the forecaster that others are compared with; by default Seasonal Naive where it
        was evaluated, else the first of each data set.
    seed
        Seed of the bootstrap.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    EvaluationError
        There is no result, two are of the same forecaster, data set and horizon, the baseline was
        not evaluated, or forecasters of one data set and horizon were given different windows.
    """
    page = html_report(
        results, command=command, title=title, note=note, baseline=baseline, seed=seed
    )
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        file = file / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whoever looks meanwhile finds the old page or the new one, never half of it.
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


def html_report(
    results: Sequence[BacktestResult],
    *,
    command: Optional[str] = None,
    title: str = "Forecast evaluation",
    note: Optional[str] = None,
    baseline: Optional[str] = None,
    seed: int = 0,
) -> str:
    """The page that `write_html_report` writes; parameters and errors are the same."""
    results = list(results)
    frame = results_frame(results)
    tasks = _tasks(results, baseline)
    styles = _styles(tasks)
    relative = {
        (task.name, result.model): score
        for task in tasks
        for result, score in _relative_scores(task, seed)
    }
    sections = [
        ("summary", "Summary", _summary(tasks, relative)),
        ("scores", "Scores", _scores(frame)),
        ("relative", "Compared with a baseline", _relative(tasks, relative, styles)),
        ("calibration", "Calibration", _calibration(tasks, styles)),
        ("horizon", "Error by step of the horizon", _horizon(tasks, styles)),
        ("forecasts", "Forecasts", html_forecasts.forecasts(tasks, styles)),
        ("experts", "Experts", html_experts.experts(tasks)),
        ("patches", "Patch sizes", html_experts.patch_sizes(tasks)),
        ("cost", "Time and memory", _cost(tasks)),
        ("made", "How this page was made", _made(command)),
    ]
    shown = [(name, heading, content) for name, heading, content in sections if content]
    body = element(
        "body",
        element("a", "Skip to the scores", href="#scores", class_="skip"),
        element(
            "header",
            element("h1", title),
            _subtitle(tasks),
            None if note is None else element("p", note),
            _navigation(shown),
        ),
        element("main", [section(*parts) for parts in shown]),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _tasks(results: Sequence[BacktestResult], baseline: Optional[str]) -> list[Task]:
    groups: dict[tuple[str, int], list[BacktestResult]] = {}
    for result in results:
        group = groups.setdefault((result.dataset, result.prediction_length), [])
        if any(other.model == result.model for other in group):
            raise EvaluationError(
                f"two results are of {result.model!r} on {result.dataset}, "
                f"{result.prediction_length} steps; name each forecaster differently."
            )
        group.append(result)
    tasks = []
    for (dataset, horizon), group in groups.items():
        several = sum(name == dataset for name, _ in groups) > 1
        name = f"{dataset}, {horizon} steps" if several else dataset
        known = [result.diagnostics for result in group if result.diagnostics is not None]
        for diagnostics in known[1:]:
            check_same_windows(diagnostics, known[0])
        tasks.append(Task(name, tuple(group), find_baseline(group, baseline)))
    return tasks


def _styles(tasks: Sequence[Task]) -> dict[str, Style]:
    """One style for each forecaster on the whole page; baselines are grey."""
    baselines = {task.baseline.model for task in tasks}
    styles, number = {}, 0
    for name in dict.fromkeys(result.model for task in tasks for result in task.results):
        if name in baselines and len(baselines) == 1:
            styles[name] = BASELINE_STYLE
        else:
            styles[name] = Style.of(number)
            number += 1
    return styles


def _relative_scores(
    task: Task, seed: int
) -> Iterable[tuple[BacktestResult, dict[str, RelativeScore]]]:
    base = task.baseline.diagnostics
    for result in task.results:
        if result is task.baseline or base is None or result.diagnostics is None:
            continue
        yield (
            result,
            {
                "CRPS": relative_score(result.diagnostics, base, "CRPS", seed=seed),
                "MASE": relative_score(result.diagnostics, base, "MASE", seed=seed),
            },
        )


Relative = Mapping[tuple[str, str], Mapping[str, RelativeScore]]


def _subtitle(tasks: Sequence[Task]) -> Markup:
    parts = [
        f"{task.name} ({task.baseline.num_series:,} series, {task.baseline.windows} "
        f"{'window' if task.baseline.windows == 1 else 'windows'} of "
        f"{task.baseline.prediction_length} steps each, freq {task.baseline.freq})"
        for task in tasks
    ]
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return element("p", "; ".join(parts), f". Written {made}.", class_="subtitle")


def _navigation(sections: Sequence[tuple[str, str, Content]]) -> Markup:
    links = [element("li", element("a", heading, href=f"#{name}")) for name, heading, _ in sections]
    return element("nav", element("ul", links), aria_label="Sections")


def _summary(tasks: Sequence[Task], relative: Relative) -> Content:
    items = []
    for task in tasks:
        scored = [result for result in task.results_diagnosed if np.isfinite(crps(result))]
        if len(scored) < 2:
            continue
        best = min(scored, key=crps)
        base = task.baseline
        parts: list[Content] = [
            element("strong", task.name),
            f": {best.model} has the lowest CRPS, {crps(best):.4g}",
        ]
        score = relative.get((task.name, best.model), {}).get("CRPS")
        if score is not None and np.isfinite(score.value):
            parts.append(f", {_times(score)} that of {base.model} ({crps(base):.4g})")
            if not score.upper < 1:
                parts.append("; the interval includes 1, so they may be equally good")
        items.append(element("li", parts, "."))
    return element("ul", items) if items else None


def _times(score: RelativeScore) -> str:
    return f"{score.value:.3g} times (95% interval {score.lower:.3g} to {score.upper:.3g})"


def _scores(frame: Any) -> Content:
    groups = frame.groupby(["dataset", "horizon"], sort=False).ngroup()
    frame = frame.iloc[np.argsort(groups.to_numpy(), kind="stable")].reset_index(drop=True)
    best = best_per_dataset(frame)
    columns = [name for name in frame.columns if name != "dataset"]
    rows: list[list[Content]] = []
    starts = ~frame.duplicated(["dataset", "horizon"])
    sizes = frame.groupby(["dataset", "horizon"])["forecaster"].transform("size")
    for i in range(len(frame)):
        cells: list[Content] = []
        if starts.iloc[i]:
            cells.append(
                element(
                    "th", frame["dataset"].iloc[i], scope="rowgroup", rowspan=int(sizes.iloc[i])
                )
            )
        for name in columns:
            text = cell_text(name, frame[name].iloc[i])
            if name == "forecaster":
                cells.append(element("th", text, scope="row"))
            elif name in best.columns and best[name].iloc[i]:
                mark = element("span", "★", class_="star", title="best")
                cells.append(element("td", element("strong", text), mark, class_="best"))
            else:
                cells.append(element("td", text))
        rows.append(cells)
    headers = ["data set", *(column_title(name) for name in columns)]
    return [
        element(
            "p",
            "★ marks the best of each data set. Smaller is better, except for the share of values "
            "in the 80% interval, which is best near 0.8.",
        ),
        data_table("Scores of all forecasters", headers, rows),
    ]


def _relative(tasks: Sequence[Task], relative: Relative, styles: Mapping[str, Style]) -> Content:
    if not relative:
        return None
    plots, rows, counts = [], [], []
    for task in tasks:
        own = [
            (result, relative[task.name, result.model])
            for result in task.results
            if (task.name, result.model) in relative
        ]
        if not own:
            continue
        plots.append(_forest(task, [(r.model, s["CRPS"]) for r, s in own], styles))
        unit = own[0][1]["CRPS"]
        counts.append(f"{task.name}: {unit.count:,} {unit.resampled}")
        for i, (result, scores) in enumerate(own):
            cells: list[Content] = []
            if i == 0:
                cells.append(element("th", task.name, scope="rowgroup", rowspan=len(own)))
            cells.append(element("th", result.model, scope="row"))
            cells.append(element("td", task.baseline.model, class_="name"))
            for score in scores.values():
                known = np.isfinite([score.value, score.lower, score.upper]).all()
                between = f"{score.lower:.3f} to {score.upper:.3f}"
                cells += [
                    element("td", f"{score.value:.3f}" if known else "–"),
                    element("td", between if known else "–"),
                ]
            rows.append(cells)
    note = (
        "A forecaster's score divided by the baseline's on the same windows; below 1 it is better. "
        "Intervals: 95%, percentile bootstrap with 2,000 draws of whole series with all their "
        "windows, or of windows where there is only one series, which takes these as independent. "
        f"Drawn from: {'; '.join(counts)}. With few series an interval is rough."
    )
    headers = ["data set", "forecaster", "baseline"]
    headers += [
        f"{name}{part}" for name in ("CRPS", "MASE") for part in (" ratio", " 95% interval")
    ]
    return [
        element("p", note),
        element("div", plots, class_="grid"),
        data_table("Scores relative to the baseline", headers, rows),
    ]


def _forest(
    task: Task, scores: Sequence[tuple[str, RelativeScore]], styles: Mapping[str, Style]
) -> Markup:
    numbers = [1.0] + [v for _, s in scores for v in (s.lower, s.value, s.upper)]
    numbers = [v for v in numbers if np.isfinite(v) and v > 0]
    reach = (min(numbers) / 1.05, max(numbers) * 1.05)
    row, top = 24, 26.0
    plot = Plot(
        task.name,
        "CRPS relative to the baseline: "
        + "; ".join(f"{name} {_times(score)}" for name, score in scores),
        reach,
        (0, 1),
        height=top + row * len(scores) + 38,
        x_label=f"CRPS / CRPS of {shortened(task.baseline.model)}",
        log_x=True,
        left=112,
    )
    plot.axis_x(_log_ticks(*reach))
    plot.down(1.0)
    for i, (name, score) in enumerate(scores):
        y, style = top + row * (i + 0.5), styles[name]
        plot.text(shortened(name), plot.left - 6, y + 4, "end")
        if np.isfinite(score.upper) and score.lower > 0:
            plot.interval(score.lower, score.value, score.upper, y, style)
    return plot.render()


def _log_ticks(lower: float, upper: float) -> list[float]:
    found = [v for v in ticks(lower, upper, 5) if v > 0]
    return sorted({*found, 1.0}) if all(abs(v - 1) > 0.04 for v in found) else found


def _calibration(tasks: Sequence[Task], styles: Mapping[str, Style]) -> Content:
    coverage: list[Markup] = []
    histograms: list[Content] = []
    rows: list[list[Content]] = []
    for task in tasks:
        known = task.diagnosed
        if not known:
            continue
        plot = Plot(
            f"Coverage, {task.name}",
            "; ".join(f"{name} {_percent(d.coverage[3])} in the 80% interval" for name, d in known),
            (0, 1),
            (0, 1),
            height=250,
            x_label="nominal level of the central interval",
            y_label="share of values inside",
        )
        levels = [0, 0.2, 0.4, 0.6, 0.8, 1]
        plot.axis_y(levels).axis_x(levels)
        plot.polyline([0, 1], [0, 1], class_="reference")
        for i, (name, diagnostics) in enumerate(known):
            plot.line(INTERVALS, diagnostics.coverage, styles[name], marks=len(INTERVALS))
            cells: list[Content] = []
            if i == 0:
                cells.append(element("th", task.name, scope="rowgroup", rowspan=len(known)))
            cells.append(element("th", name, scope="row"))
            cells += [element("td", f"{share:.3f}") for share in diagnostics.coverage]
            rows.append(cells)
        coverage.append(plot.render())
        pits = [_pit(name, diagnostics, styles[name]) for name, diagnostics in known]
        histograms += [element("h4", task.name), element("div", pits, class_="grid small")]
    if not rows:
        return None
    return [
        element("h3", "Coverage against the nominal level"),
        element(
            "p",
            "A calibrated forecaster lies on the diagonal. Below it intervals are too narrow, "
            "above it too wide.",
        ),
        _legend(tasks, styles),
        element("div", coverage, class_="grid"),
        data_table(
            "Share of values inside the central intervals",
            ["data set", "forecaster", *(f"{level:.0%}" for level in INTERVALS)],
            rows,
        ),
        element("h3", "Where values fall among the forecasts’ deciles (PIT)"),
        element(
            "p",
            "The probability integral transform: each bar is the share of values between two "
            "neighbouring deciles of their forecast. Flat at 10% (the line) is calibrated; ∪ means "
            "forecasts too narrow, ∩ too wide, a slope a bias.",
        ),
        histograms,
    ]


def _pit(name: str, diagnostics: Diagnostics, style: Style) -> Markup:
    shares = diagnostics.pit / max(diagnostics.pit.sum(), 1)
    top = max(0.2, float(shares.max()) * 1.05)
    plot = Plot(
        shortened(name, 26),
        f"shares of {PIT_BINS} bins from low to high: {', '.join(map(_percent, shares))}",
        (0, 1),
        (0, top),
        width=230,
        height=140,
        left=38,
    )
    plot.axis_y(ticks(0, top, 4)).axis_x([0, 0.5, 1])
    plot.bars(np.linspace(0, 1, PIT_BINS + 1).tolist(), shares.tolist(), style.colour)
    return plot.across(1 / PIT_BINS).render()


def _percent(share: float) -> str:
    return f"{share:.0%}" if np.isfinite(share) else "–"


def _legend(tasks: Sequence[Task], styles: Mapping[str, Style]) -> Markup:
    names = dict.fromkeys(name for task in tasks for name, _ in task.diagnosed)
    items = [element("li", swatch(styles[name]), " ", name) for name in names]
    return element("ul", items, class_="legend")


def _horizon(tasks: Sequence[Task], styles: Mapping[str, Style]) -> Content:
    plots = []
    for task in tasks:
        known = [(name, d.step_crps) for name, d in task.diagnosed]
        known = [(name, errors) for name, errors in known if np.isfinite(errors).any()]
        horizon = task.baseline.prediction_length
        if not known or horizon < 2:
            continue
        most = max(float(np.nanmax(errors)) for _, errors in known)
        top = most * 1.05 if most > 0 else 1.0
        plot = Plot(
            f"CRPS by step, {task.name}",
            "; ".join(
                f"{name} from {errors[0]:.3g} at the first step to {errors[-1]:.3g} at the last"
                for name, errors in known
            ),
            (1, horizon),
            (0, top),
            height=240,
            x_label=f"steps ahead, freq {task.baseline.freq}",
            y_label="quantile loss / mean |value|",
            left=54,
        )
        steps = sorted({1, *(int(t) for t in ticks(1, horizon, 6) if t >= 1)})
        plot.axis_y(ticks(0, top)).axis_x([float(step) for step in steps])
        for name, errors in known:
            plot.line(np.arange(1, horizon + 1), errors, styles[name], marks=8)
        plots.append(plot.render())
    if not plots:
        return None
    return [
        element(
            "p",
            "The quantile loss of each step, divided by the mean absolute value of the labels: "
            "where nothing is missing, its mean over the steps is the CRPS.",
        ),
        _legend(tasks, styles),
        element("div", plots, class_="grid"),
    ]


def _cost(tasks: Sequence[Task]) -> Content:
    rows: list[list[Content]] = []
    for task in tasks:
        for i, result in enumerate(task.results):
            cells: list[Content] = []
            if i == 0:
                cells.append(element("th", task.name, scope="rowgroup", rowspan=len(task.results)))
            count = result.num_series * result.windows
            size = _network_size(result.predictor)
            cells += [
                element("th", result.model, scope="row"),
                element("td", f"{result.train_seconds:.1f}" if result.train_seconds else "–"),
                element("td", f"{result.predict_seconds:.2f}"),
                element("td", f"{1000 * result.predict_seconds / count:.2f}"),
                element("td", "–" if size is None else f"{size[0]:,}"),
                element("td", "–" if size is None else f"{size[1] / 1e6:.2f}"),
            ]
            rows.append(cells)
    headers = [
        "data set", "forecaster", "training s", "forecasting s", "ms per window", "parameters",
        "weights MB",
    ]  # fmt: skip
    return [
        element(
            "p",
            "Wall-clock time. Forecasts that compute their quantiles when asked do so after the "
            "time is taken. The memory of the whole process stands below.",
        ),
        data_table("Time and size of every forecaster", headers, rows),
    ]


def _network_size(predictor: Any) -> Optional[tuple[int, int]]:
    """Number of a network's parameters and their bytes, where the predictor has one."""
    network = getattr(predictor, "prediction_net", None)
    if network is None or not hasattr(network, "parameters"):
        return None
    weights = list(network.parameters())
    return sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)


def _made(command: Optional[str]) -> Content:
    rows = [
        [element("th", name, scope="row"), element("td", value, class_="text")]
        for name, value in describe_environment().items()
    ]
    return [
        None if command is None else element("pre", element("code", command), tabindex="0"),
        data_table("Machine and versions", ["", ""], rows),
    ]
