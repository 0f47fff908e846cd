from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor
from known_forecasters import BandPredictor, RecordingEstimator
from moecast.evaluation import EvaluationError, load_wide
from moecast.evaluation.cli import app
from moecast.evaluation.specs import ForecasterSpec, dimensions, parse_forecasters
from typer.testing import CliRunner

NAIVE = "gluonts.model.seasonal_naive.SeasonalNaivePredictor"
BAND = "known_forecasters.BandPredictor"
RECORDING = "known_forecasters.RecordingEstimator"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_module_help_lists_the_commands() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "moecast.evaluation", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "backtest" in found.stdout
    assert "long-horizon" in found.stdout


def test_backtest_of_two_forecasters_writes_gift_evals_files(
    hourly_csv: Path, tmp_path: Path
) -> None:
    out, plot = tmp_path / "out", tmp_path / "plot.png"
    code, stdout, _ = run(
        "backtest", "--data", hourly_csv, "--prediction-length", 6, "--windows", 2,
        "--forecaster", NAIVE, "--forecaster", f"mean={RECORDING}",
        "--set", "width=2.5", "--set", "SeasonalNaive.season_length=12",
        "--name", "counting", "--domain", "Nature", "--out", out, "--plot", plot,
    )  # fmt: skip
    assert code == 0
    assert "SeasonalNaive" in stdout
    (naive,) = csv.DictReader((out / "SeasonalNaive" / "all_results.csv").open())
    assert (naive["dataset"], naive["domain"]) == ("counting/H/short", "Nature")
    # A line that climbs by 1 an hour is 12 higher half a day later.
    assert float(naive["eval_metrics/MAE[0.5]"]) == pytest.approx(12)
    assert (out / "mean" / "config.json").is_file()
    assert plot.is_file()


def test_long_horizon_writes_a_row_per_horizon_and_forecaster(
    hourly_csv: Path, tmp_path: Path
) -> None:
    code, _, _ = run(
        "long-horizon", "--data", hourly_csv, "--prediction-length", 3, "--prediction-length", 5,
        "--context-length", 10, "--forecaster", NAIVE, "--forecaster", BAND,
        "--set", "SeasonalNaive.season_length=1", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(zip(table["horizon"], table["forecaster"])) == [
        (3, "SeasonalNaive"), (3, "Band"), (5, "SeasonalNaive"), (5, "Band"),
    ]  # fmt: skip
    scale = np.arange(70).std()
    assert table["MAE"][0] == pytest.approx(2 / scale, rel=1e-5)
    assert "**" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("format", ["monash", "m4", "long", "jsonl", "long-horizon"])
def test_every_format_can_be_backtested(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{'jsonl' if format == 'jsonl' else 'csv'}"
    values = ",".join(map(str, range(1, 31)))
    header = ",".join(f"V{number}" for number in range(1, 31))
    dates = pd.date_range("2024-01-01", periods=30, freq="D").strftime("%Y-%m-%d")
    text = {
        "monash": f"series_name,start_timestamp,{header}\nT1,2024-01-01,{values}\n",
        "m4": f"V0,{header}\nD1,{values}\n",
        "long": "when,y,who\n" + "".join(f"{day},{n},a\n" for n, day in enumerate(dates)),
        "jsonl": f'{{"start": "2024-01-01", "target": [{values}]}}\n',
        "long-horizon": "when,y\n" + "".join(f"{day},{n}\n" for n, day in enumerate(dates)),
    }
    path.write_text(text[format])
    options: list[object] = ["--format", format, "--prediction-length", 2, "--windows", 1]
    if format in ("monash", "m4", "jsonl"):
        options += ["--freq", "D"]
    if format in ("long", "long-horizon"):
        options += ["--timestamp", "when"]
    if format == "long":
        options += ["--target", "y", "--item-id", "who"]
    out = tmp_path / "out"
    code, _, stderr = run("backtest", "--data", path, *options, "--forecaster", NAIVE, "--out", out)
    assert code == 0, stderr
    (row,) = csv.DictReader((out / "all_results.csv").open())
    error = 1.5 if format != "long-horizon" else 1.5 / np.arange(21).std()
    assert float(row["eval_metrics/MAE[0.5]"]) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--forecaster", "gluonts.torch.NoSuch"],
            "'gluonts.torch.NoSuch': there is no such class",
        ),
        (["--forecaster", "pathlib.Path"], "'pathlib.Path': not an Estimator or Predictor"),
        (["--forecaster", BAND, "--set", "widht=1"], "Band has no parameter 'widht'"),
        (["--forecaster", BAND, "--set", "width"], "not of the form name=value"),
        (["--forecaster", BAND, "--set", "Bnad.width=1"], "no forecaster 'Bnad'"),
        (["--forecaster", BAND, "--forecaster", BAND], "two forecasters are named 'Band'"),
        (["--forecaster", RECORDING, "--set", "width=-1"], "width=-1 must not be negative"),
        (["--forecaster", BAND, "--windows", "99"], "series 'a' has 100 values"),
        (["--forecaster", BAND, "--format", "monash"], "--format monash does not state"),
        (["--forecaster", BAND, "--timestamp", "when"], "no column 'when'"),
        (["--forecaster", BAND, "--freq", "fortnight"], "freq='fortnight'"),
        (["--forecaster", BAND, "--format", "tsv"], "'tsv'"),
    ],
)
def test_bad_options_exit_with_2_and_one_sentence(
    options: list[str], message: str, hourly_csv: Path
) -> None:
    code, _, stderr = run("backtest", "--data", hourly_csv, "--prediction-length", 6, *options)
    assert code == 2
    assert "Traceback" not in stderr
    assert message in " ".join(stderr.split())


def test_a_fault_inside_a_forecaster_keeps_its_traceback(
    hourly_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("inside")

    monkeypatch.setattr(BandPredictor, "predict", fail)
    with pytest.raises(ValueError, match="inside"):
        run("backtest", "--data", hourly_csv, "--prediction-length", 6, "--forecaster", BAND)


def test_settings_are_decoded_and_reach_only_those_who_take_them() -> None:
    band, recording, naive = parse_forecasters(
        [BAND, RECORDING.replace("s.R", "s:R"), NAIVE],
        ["width=2", "Recording.freq=[1, 2]", "level=text"],
    )
    assert band.settings == {"width": 2, "level": "text"}
    assert recording.settings == {"width": 2, "freq": [1, 2]}
    assert naive.settings == {}


def test_context_fills_only_what_is_taken_and_not_set() -> None:
    (spec,) = parse_forecasters([RECORDING], ["prediction_length=7"])
    built = spec.build(prediction_length=3, freq="h", context_length=9, width=None)
    assert isinstance(built, RecordingEstimator)
    assert (built.prediction_length, built.freq, built.width) == (7, "h", 1.0)


def test_dictionaries_of_settings_are_merged() -> None:
    (spec,) = parse_forecasters(
        ["gluonts.torch.DLinearEstimator"], ['trainer_kwargs={"max_epochs": 3}']
    )
    built = spec.build(prediction_length=3, trainer_kwargs={"logger": False, "max_epochs": 9})
    assert built.trainer_kwargs["max_epochs"] == 3  # type: ignore[union-attr]
    assert built.trainer_kwargs["logger"] is False  # type: ignore[union-attr]


def test_dimensions_follow_the_entries(hourly_csv: Path, hourly: list[dict]) -> None:
    assert dimensions(hourly) == {}
    assert dimensions(load_wide(hourly_csv, multivariate=True)) == {"target_dim": 2}
    for number, entry in enumerate(hourly):
        entry["feat_dynamic_real"] = np.zeros((3, 10))
        entry["feat_static_cat"] = np.array([number, 4])
    assert dimensions(hourly) == {
        "num_feat_dynamic_real": 3,
        "num_feat_static_cat": 2,
        "cardinality": [2, 5],
    }


def test_a_repeated_class_can_be_named_apart() -> None:
    specs = parse_forecasters([BAND, f"wide={BAND}"], ["wide.width=9"])
    assert [(spec.name, spec.settings) for spec in specs] == [("Band", {}), ("wide", {"width": 9})]


def test_walmart_with_covariates(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    code, _, stderr = run(
        "backtest", "--data", shared_file("walmart_sales_weekly.csv"), "--format", "long",
        "--timestamp", "Date", "--target", "Weekly_Sales", "--item-id", "id",
        "--feat-dynamic-real", "Temperature", "--feat-static-cat", "Type",
        "--prediction-length", 4, "--windows", 2, "--forecaster", NAIVE,
        "--seasonality", 52, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, stderr
    (row,) = csv.DictReader((tmp_path / "all_results.csv").open())
    assert row["dataset"] == "walmart_sales_weekly/W/short"


def test_an_unusable_setting_quotes_the_constructor() -> None:
    (spec,) = parse_forecasters([NAIVE], ["season_length=0"])
    with pytest.raises(EvaluationError, match=r"SeasonalNaive cannot be made: .*season_length"):
        spec.build(prediction_length=3)


class SmoothingModel:
    def __init__(self, season_length: int, damped: bool = False) -> None:
        self.season_length, self.damped = season_length, damped


class WrappingPredictor(Predictor):
    """As GluonTS wraps statsforecast: what it does not know goes to the model."""

    ModelType = SmoothingModel

    def __init__(
        self, prediction_length: int, quantile_levels: list[float] | None = None, **model: Any
    ) -> None:
        super().__init__(prediction_length)
        self.model = self.ModelType(**model)
        self.quantile_levels = quantile_levels


def test_a_wrapped_model_is_given_what_it_has_parameters_for() -> None:
    spec = ForecasterSpec("smoothing", WrappingPredictor, {"damped": True})
    built: Any = spec.build(freq="M", prediction_length=3, season_length=12, trainer_kwargs={})
    assert (built.prediction_length, built.model.season_length) == (3, 12)
    assert built.model.damped
    assert {0.1, 0.5, 0.9} < set(built.quantile_levels)
