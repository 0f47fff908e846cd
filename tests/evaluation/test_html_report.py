from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import pandas as pd
import pytest
from gluonts.model import Forecast
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from known_forecasters import BandPredictor
from moecast.evaluation import (
    BacktestResult,
    EvaluationError,
    backtest,
    html_report,
    relative_score,
    results_frame,
    write_html_report,
)
from moecast.evaluation.html_forecasts import _date
from moecast.evaluation.svg import Markup, Plot, Style, element, ticks

HORIZON = 6
# What an evil file could be called.
NASTY = "<script>alert('1')</script> & \"q\""


class RoutedPredictor(BandPredictor):
    """A band that says which of three experts made it: by hour the one, by noise the other two."""

    reports_routing = False

    def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
        generator = np.random.default_rng(0)
        for forecast in super().predict(dataset):
            if self.reports_routing:
                first, rest = forecast.start_date.hour / 24, generator.random()
                rows = np.array([first, (1 - first) * rest, (1 - first) * (1 - rest)])
                forecast.info = {"expert_weights": {"router": rows}, "patch_size": 2}
            yield forecast


@pytest.fixture(scope="module")
def results() -> list[BacktestResult]:
    """Two data sets, three forecasters, one of them with experts; windows at several hours."""
    start = pd.Period("2024-01-01", freq="h")
    values = 10 + np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)
    hourly = [
        {"item_id": name, "start": start, "target": target}
        for name, target in zip((NASTY, "series 1"), values)
    ]
    made = []
    for name, entries in (("x", hourly), (NASTY, hourly[:1])):
        for model, predictor in (
            ("Seasonal Naive", SeasonalNaivePredictor(HORIZON, 24)),
            ("band", BandPredictor(HORIZON, level=10.0, width=4.0)),
            ("routed", RoutedPredictor(HORIZON, level=10.0, width=8.0)),
        ):
            made.append(
                backtest(
                    predictor, entries, prediction_length=HORIZON, windows=14, distance=7,
                    dataset_name=name, model=model,
                )
            )  # fmt: skip
    return made


def parse(page: str) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.partition("\n")[2])


def tables(root: ElementTree.Element) -> dict[str, list[list[str]]]:
    """Text of the cells of each table, by its caption."""
    found = {}
    for table in root.iter("table"):
        caption = "".join(table.find("caption").itertext())  # type: ignore[union-attr]
        found[caption] = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    return found


class Reader(HTMLParser):
    """Checks that every element that is opened is closed, and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(results: list[BacktestResult]) -> None:
    page = html_report(results, command="moecast evaluate")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    resources = {"src", "srcset", "action", "data", "poster", "xlink:href"}
    for tag, name, value in reader.attributes:
        assert name not in resources, (tag, name, value)
        assert name != "href" or value.startswith("#")
        assert "url(" not in value
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe|<img", page)
    root = parse(page)
    identifiers = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(set(identifiers)) == len(identifiers)
    targets = {node.get("href", "")[1:] for node in root.iter("a")}
    assert targets <= set(identifiers)
    assert root.get("lang") == "en"


def test_a_page_can_be_read_without_seeing_it(results: list[BacktestResult]) -> None:
    root = parse(html_report(results))
    plots = [svg for svg in root.iter("svg") if svg.get("aria-hidden") is None]
    assert plots
    for svg in plots:
        assert svg.get("role") == "img"
        assert svg.find("title").text  # type: ignore[union-attr]
    for table in root.iter("table"):
        assert table.find("caption") is not None
        for row in table.iter("tr"):
            assert row.find("th") is not None
    levels = [int(node.tag[1]) for node in root.iter() if re.fullmatch(r"h[1-6]", node.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_what_users_named_is_escaped(results: list[BacktestResult]) -> None:
    results = [*results, replace(results[0], dataset="y", model="</style><b>&amp;")]
    page = html_report(results, command=f"evaluate {NASTY}", title=NASTY, note=NASTY)
    assert "<script" not in page
    assert "</style><b>" not in page
    root = parse(page)
    assert root.find("head/title").text == NASTY  # type: ignore[union-attr]
    assert root.findall("body/header/p")[1].text == NASTY
    assert root.find("body//pre/code").text == f"evaluate {NASTY}"  # type: ignore[union-attr]
    assert any(row[0] == NASTY for row in tables(root)["Scores of all forecasters"])


def test_the_numbers_of_the_tables_are_the_results(results: list[BacktestResult]) -> None:
    found = tables(parse(html_report(results, seed=4)))
    frame = results_frame(results)
    header, *rows = found["Scores of all forecasters"]
    assert header[-6:] == ["MASE", "CRPS", "MSIS", "ND", "in 80%", "train s", "pred. s"][-6:]
    for row, (_, expected) in zip(rows, frame.iterrows(), strict=True):
        cells = row[-len(frame.columns) + 1 :]
        assert cells[:2] == [str(HORIZON), expected["forecaster"]]
        for text, value in zip(cells[2:], expected.iloc[3:]):
            assert float(text.rstrip("★")) == pytest.approx(value, rel=1e-3, abs=0.06)
    # The band suits the data, and is best in each data set.
    starred = {row[-len(frame.columns) + 2] for row in rows if row[-6].endswith("★")}
    assert starred

    header, *rows = found["Scores relative to the baseline"]
    assert len(rows) == 4
    score = relative_score(results[1].diagnostics, results[0].diagnostics, "CRPS", seed=4)  # type: ignore[arg-type]
    assert rows[0] == [
        "x", "band", "Seasonal Naive", f"{score.value:.3f}",
        f"{score.lower:.3f} to {score.upper:.3f}", *rows[0][-2:],
    ]  # fmt: skip
    _, first, *_ = found["Share of values inside the central intervals"]
    np.testing.assert_allclose(
        [float(text) for text in first[2:]],
        results[0].diagnostics.coverage,
        atol=6e-4,  # type: ignore[union-attr]
    )


def test_the_order_of_series_changes_no_score(hourly: list[dict]) -> None:
    pages = []
    for entries in (hourly, hourly[::-1]):
        made = [
            backtest(p, entries, prediction_length=HORIZON, windows=3, model=name)
            for name, p in (("a", BandPredictor(HORIZON, 10.0)), ("b", BandPredictor(HORIZON, 9.0)))
        ]
        # Times differ between runs.
        made = [replace(result, predict_seconds=0.0) for result in made]
        pages.append(tables(parse(html_report(made))))
    for caption in ("Scores of all forecasters", "Scores relative to the baseline"):
        assert pages[0][caption] == pages[1][caption]


def test_experts_are_shown_by_hour_and_patch_sizes_by_window(
    results: list[BacktestResult],
) -> None:
    found = tables(parse(html_report(results)))
    header, row = found["routed on x: experts of each router"]
    assert header == ["router", "0", "1", "2", "effective", "by hour", "by weekday", "by series"]
    weights = results[2].diagnostics.expert_weights["router"]  # type: ignore[union-attr]
    assert [int(text) for text in row[1:4]] == (100 * weights.mean(axis=0)).round().tolist()
    _, *by_hour = found["Experts of router by hour"]
    for hour, first, *_ in by_hour:
        assert int(first) == round(100 * int(hour[:2]) / 24)
    assert found["Patch sizes"][1] == ["x", "routed", "2: 28 (100%)"]


def test_what_is_not_known_is_left_out(results: list[BacktestResult]) -> None:
    bare = [replace(result, diagnostics=None) for result in results]
    root = parse(html_report(bare))
    sections = [node.get("id") for node in root.iter("section")]
    assert sections == ["scores", "cost", "made"]
    without = [results[0], results[1]]
    sections = [node.get("id") for node in parse(html_report(without)).iter("section")]
    assert "experts" not in sections
    assert "patches" not in sections
    alone = parse(html_report(results[1:2]))
    assert "relative" not in [node.get("id") for node in alone.iter("section")]


def test_gaps_and_channels_are_drawn(multivariate: list[dict]) -> None:
    multivariate[0]["target"][:, -9] = np.nan
    multivariate[0]["target"][0, -2] = np.nan
    result = backtest(BandPredictor(HORIZON, 5.0), multivariate, prediction_length=HORIZON)
    root = parse(html_report([result]))
    numbers = [node.get("points", "") + node.get("d", "") for node in root.iter()]
    assert not any("nan" in text or "inf" in text for text in numbers)


@pytest.mark.filterwarnings("ignore::moecast.evaluation.UnscaledSeriesWarning")
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_series_without_errors_or_labels_make_a_page(hourly: list[dict], value: float) -> None:
    """Ratios are 0, 0 / 0 or unknown, and there is no unit to divide by."""
    for entry in hourly:
        entry["target"][-2 * HORIZON :] = value
        if value == 7:
            entry["target"][:] = value
    made = [
        backtest(p, hourly, prediction_length=HORIZON, windows=2, model=name)
        for name, p in (
            ("base", BandPredictor(HORIZON, 9.0)),
            ("perfect", BandPredictor(HORIZON, 7.0, 0.0)),
        )
    ]
    root = parse(html_report(made))
    drawn = [
        text for svg in root.iter("svg") for node in svg.iter() for text in node.attrib.values()
    ]
    assert not any(re.search(r"nan|inf", text) for text in drawn)
    ratio = tables(root)["Scores relative to the baseline"][1][3]
    if value == 7:
        assert ratio == "0.000"
    assert ("–" in ratio) == (value != 7)


def test_the_file_is_written_whole_or_not_at_all(
    results: list[BacktestResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "folder"
    file = write_html_report(results, folder)
    assert file == folder / "report.html"
    assert file.stat().st_size < 600_000
    named = write_html_report(results[:1], tmp_path / "named.html")
    assert named == tmp_path / "named.html"
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_html_report(results[:1], folder)
    assert file.read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["report.html"]


def test_results_that_cannot_be_compared_are_refused(
    results: list[BacktestResult], hourly: list[dict], tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="no result"):
        write_html_report([], tmp_path)
    with pytest.raises(EvaluationError, match="two results are of 'band' on x"):
        write_html_report([results[1], results[1]], tmp_path)
    with pytest.raises(EvaluationError, match="'other' was not evaluated"):
        write_html_report(results, tmp_path, baseline="other")
    fewer = backtest(
        BandPredictor(HORIZON), hourly, prediction_length=HORIZON, windows=2, dataset_name="x"
    )
    with pytest.raises(EvaluationError, match="different windows"):
        write_html_report([results[0], fewer], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_horizons_of_one_data_set_are_told_apart(hourly: list[dict]) -> None:
    made = [
        backtest(BandPredictor(h), hourly, prediction_length=h, windows=1, dataset_name="x")
        for h in (3, 6)
    ]
    found = tables(parse(html_report(made)))["Share of values inside the central intervals"]
    assert [row[0] for row in found[1:]] == ["x, 3 steps", "x, 6 steps"]


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 0.35, [0, 0.1, 0.2, 0.3]), (-7, 13, [-5, 0, 5, 10])],
)
def test_ticks_are_round(lower: float, upper: float, expected: list[float]) -> None:
    assert ticks(lower, upper) == expected


def test_elements_escape_all_but_markup() -> None:
    inner = element("b", "a<b", None, [1, 0.25])
    assert inner == "<b>a&lt;b10.2</b>"
    assert isinstance(inner, Markup)
    assert element("p", inner, class_='"x"', data_y=None) == f'<p class="&quot;x&quot;">{inner}</p>'


def test_plots_place_values_on_their_axes() -> None:
    plot = Plot("t", "d", (1, 100), (0, 10), log_x=True)
    assert plot.at_x(10) == pytest.approx((plot.at_x(1) + plot.at_x(100)) / 2)
    assert plot.at_y(10) < plot.at_y(0)
    plot.line([1, 10, 100], [1, np.nan, 2], Style.of(0))
    # A gap in the data is a gap in the line.
    assert plot.render().count("<polyline") == 2


def test_forecasters_differ_by_more_than_colour() -> None:
    styles = [Style.of(i) for i in range(12)]
    assert len({(style.dash, style.marker) for style in styles[:6]}) == 6
    assert len(set(styles)) == 12


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to render the page with")
def test_a_browser_renders_it(results: list[BacktestResult], tmp_path: Path) -> None:
    """Screenshots lie in the folder that MOECAST_TEST_ARTEFACTS names, else in a temporary one."""
    assert BROWSER is not None
    folder = Path(os.environ.get("MOECAST_TEST_ARTEFACTS", tmp_path)).resolve()
    file = write_html_report(results, folder / "html_report")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    for name, size in (("desktop", "1280,3000"), ("phone", "390,3000")):
        image = folder / "html_report" / f"{name}.png"
        subprocess.run(
            [BROWSER, *options, f"--window-size={size}", f"--screenshot={image}", file.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        assert image.stat().st_size > 20_000


def test_dates_are_told_as_their_frequency_allows() -> None:
    assert _date(pd.Period("2024-02-03 05:00", freq="h")) == "03 Feb 05:00"
    assert _date(pd.Period("2024-02", freq="M")) == "Feb 2024"
    assert _date(pd.Period("2024-02-04", freq="W-SUN")) == "04 Feb 2024"
