from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from gluonts.ev.metrics import MAE
from known_forecasters import BandPredictor
from moecast.evaluation import EvaluationError, backtest, write_gift_eval
from moecast.evaluation.gift_eval import config_name

HEADER = (
    "dataset,model,eval_metrics/MSE[mean],eval_metrics/MSE[0.5],eval_metrics/MAE[0.5],"
    "eval_metrics/MASE[0.5],eval_metrics/MAPE[0.5],eval_metrics/sMAPE[0.5],eval_metrics/MSIS,"
    "eval_metrics/RMSE[mean],eval_metrics/NRMSE[mean],eval_metrics/ND[0.5],"
    "eval_metrics/mean_weighted_sum_quantile_loss,domain,num_variates"
)


def test_all_results_has_the_leaderboards_columns_and_exact_values(
    hourly: list[dict], tmp_path: Path
) -> None:
    result = backtest(BandPredictor(6), hourly, prediction_length=6, dataset_name="ett1")
    (folder,) = write_gift_eval(
        result, tmp_path / "Band", term="long", domain="Energy", org="moecast"
    )
    text = (folder / "all_results.csv").read_text()
    assert text.splitlines()[0] == HEADER
    (row,) = csv.DictReader(text.splitlines())
    assert (row["dataset"], row["model"]) == ("ett1/H/long", "Band")
    assert (row["domain"], row["num_variates"]) == ("Energy", "1")
    for name, value in result.metrics.items():
        if name != "coverage[0.8]":
            assert float(row[f"eval_metrics/{name}"]) == value
    assert json.loads((folder / "config.json").read_text()) == {
        "model": "Band",
        "model_type": "deep-learning",
        "model_dtype": "float32",
        "org": "moecast",
    }


def test_several_models_have_a_folder_each(hourly: list[dict], tmp_path: Path) -> None:
    results = [
        backtest(
            BandPredictor(6), hourly, prediction_length=6, windows=1, model=model, dataset_name=name
        )
        for name in ("x", "y")
        for model in ("a", "b")
    ]
    assert write_gift_eval(results, tmp_path) == [tmp_path / "a", tmp_path / "b"]
    rows = list(csv.DictReader((tmp_path / "b" / "all_results.csv").open()))
    assert [(row["dataset"], row["model"]) for row in rows] == [
        ("x/H/short", "b"),
        ("y/H/short", "b"),
    ]


@pytest.mark.parametrize(
    ("freq", "expected"),
    [("15min", "15T"), ("h", "H"), ("10s", "10S"), ("D", "D"), ("W-SUN", "W"), ("M", "M"),
     ("Q-DEC", "Q"), ("Y-DEC", "A")],
)  # fmt: skip
def test_frequencies_have_gift_evals_names(freq: str, expected: str) -> None:
    assert config_name("x", freq) == f"x/{expected}/short"


def test_results_without_gift_evals_metrics_are_refused(hourly: list[dict], tmp_path: Path) -> None:
    result = backtest(BandPredictor(6), hourly, prediction_length=6, windows=1, metrics=[MAE()])
    with pytest.raises(EvaluationError, match=r"needs the metric 'MSE\[mean\]'"):
        write_gift_eval(result, tmp_path)
    with pytest.raises(EvaluationError, match="no result to write"):
        write_gift_eval([], tmp_path)
