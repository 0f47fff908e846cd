"""`moecast evaluate`, `experts` and `benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterable, Iterator

import numpy as np
import pandas as pd
import pytest
from cli_cases import Run, sales
from moecast.evaluation import backtest, from_long_frame
from moecast.evaluation.cli.evaluate import _steps_since_training
from moecast.evaluation.cli.model_folder import Record, SavedModel, load_model
from moecast.evaluation.cli.sources import ReadSettings
from moecast.evaluation.expert_usage import (
    draw_windows,
    expert_shares,
    specialisation,
    window_usage,
)
from moecast.forecasters import MoLEPredictor


def test_windows_held_out_are_evaluated_as_a_backtest_would(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    code, stdout, stderr = run(
        "evaluate", model_dir, "--data", sales_csv, "--forecaster", "seasonal-naive",
        "--forecaster", "night=seasonal-naive", "--set", "night.season_length=12", "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    assert "was trained on" not in stderr
    rows = {row["forecaster"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["tiny", "SeasonalNaive", "night"]
    assert all(row["windows"] == 2 and not row["trained_on_windows"] for row in rows.values())
    assert "SeasonalNaive" in stdout
    entries = from_long_frame(sales(), timestamp="ds", target="y", item_id="id")
    expected = backtest(
        MoLEPredictor.deserialize(model_dir), entries, prediction_length=6, windows=2
    ).metrics
    for name in ("MASE[0.5]", "MSIS"):
        assert rows["tiny"][name] == pytest.approx(expected[name], rel=1e-5)
    assert rows["night"]["MASE[0.5]"] > rows["SeasonalNaive"]["MASE[0.5]"]


def test_forecasters_are_evaluated_without_a_model(
    run: Run, sales_csv: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "--data", sales_csv, "--timestamp", "ds", "--item-id", "id",
               "--target", "y", "--forecaster", "seasonal-naive"]  # fmt: skip
    out = tmp_path / "scores.csv"
    code, _, stderr = run(*command, "--prediction-length", 3, "--out", out)
    assert code == 0, stderr
    # GIFT-Eval's rule: a tenth of 60 steps.
    assert pd.read_csv(out)["windows"].tolist() == [2]
    code, _, stderr = run(*command)
    assert code == 2
    assert "--prediction-length is missing" in stderr


def test_windows_trained_on_are_told(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    code, _, stderr = run("evaluate", model_dir, "--data", sales_csv, "--windows", 3, "--out", out)
    assert code == 0
    assert "tiny was trained on steps of these windows in 3 of 3 series" in " ".join(stderr.split())
    assert pd.read_csv(out)["trained_on_windows"].tolist() == [True]


def test_a_file_that_has_grown_is_evaluated_on_what_is_new(
    run: Run, model_dir: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "grown.csv", tmp_path / "scores.csv"
    sales(hours=60 + 15).to_csv(data, index=False)
    code, _, stderr = run("evaluate", model_dir, "--data", data, "--out", out)
    assert code == 0, stderr
    # 12 steps were held out and 15 have come: four whole windows of 6.
    row = pd.read_csv(out).iloc[0]
    assert (row["windows"], row["trained_on_windows"]) == (4, False)


@pytest.mark.parametrize("freq", ["h", "15min", "M", "W-FRI", "D"])
def test_steps_since_training_are_counted_in_the_series_frequency(freq: str) -> None:
    start = pd.Period("2024-01-05", freq=freq)
    until = {"a": str(start + 69)}
    record = Record("mole", ReadSettings(), trained_until=until)
    model = SavedModel("tiny", None, record)  # type: ignore[arg-type]
    entry = {"item_id": "a", "start": start, "target": np.zeros(100)}
    assert _steps_since_training(model, entry) == 30
    assert _steps_since_training(model, {**entry, "item_id": "new"}) is None


def test_covariates_beyond_the_target_do_not_shift_the_windows(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    scores = []
    for future in (0, 6):
        frame = sales(hours=72)
        late = frame["ds"] >= frame["ds"].min() + pd.Timedelta(hours=66)
        frame = frame.assign(y=frame["y"].mask(late)) if future else frame[~late]
        data, out = tmp_path / f"{future}.csv", tmp_path / f"{future}-scores.csv"
        frame.to_csv(data, index=False)
        code, _, stderr = run("evaluate", covariate_model, "--data", data, "--out", out)
        assert code == 0, stderr
        scores.append(pd.read_csv(out)["MSE[mean]"][0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_models_of_different_horizons_are_not_compared(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    code, _, stderr = run(
        "train", "mole", "--data", sales_csv, "--timestamp", "ds", "--item-id", "id",
        "--target", "y", "--prediction-length", 4, "--context-length", 8, "--num-experts", 1,
        "--max-steps", 1, "--accelerator", "cpu", "--out", tmp_path / "short",
    )  # fmt: skip
    assert code == 0, stderr
    code, _, stderr = run("evaluate", model_dir, tmp_path / "short", "--data", sales_csv)
    assert code == 2
    assert "the horizons differ (tiny: 6, short: 4)" in " ".join(stderr.split())


class HourPredictor:
    """Hears expert 0 in forecasts that begin at an even hour, expert 1 at odd ones."""

    reports_routing = False
    expert_usage = SimpleNamespace(chosen_share={"layer": np.array([0.5, 0.5])})

    def predict(self, dataset: Iterable[dict], num_samples: int) -> Iterator[SimpleNamespace]:
        assert self.reports_routing
        for entry in dataset:
            odd = (entry["start"] + len(entry["target"])).hour % 2
            yield SimpleNamespace(info={"expert_weights": {"layer": np.array([1.0 - odd, odd])}})


def test_specialisation_finds_what_the_experts_follow() -> None:
    entries: list[dict[str, Any]] = from_long_frame(
        sales("ab", hours=240), timestamp="ds", target="y", item_id="id"
    )
    windows = draw_windows(entries, 6, 12, count=10_000)
    assert len(windows) == 2 * (240 - 6 - 12 + 1)
    predictor = HourPredictor()
    usage = window_usage(predictor, windows)
    assert not predictor.reports_routing
    by_hour = expert_shares(usage, windows, "hour")
    assert by_hour["group"].unique().tolist() == list(range(24))
    share = by_hour[by_hour["expert"] == 1].set_index("group")["weight_share"]
    assert share.tolist() == [float(hour % 2) for hour in range(24)]
    by_series = expert_shares(usage, windows, "series")
    distance = specialisation(pd.concat([by_hour, by_series])).set_index("by")["distance"]
    assert distance["hour"] == pytest.approx(0.5, abs=0.01)
    assert distance["series"] == 0


def test_windows_are_drawn_alike_with_one_seed() -> None:
    entries = from_long_frame(sales(), timestamp="ds", target="y", item_id="id")
    drawn = [draw_windows(entries, 6, 12, 20, seed) for seed in (0, 0, 1)]
    starts = [[(w.entry["item_id"], w.start) for w in windows] for windows in drawn]
    assert len(set(starts[0])) == 20
    assert starts[0] == starts[1] != starts[2]


def test_experts_are_listed_by_layer_and_group(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "experts.csv"
    code, stdout, stderr = run(
        "experts", model_dir, "--data", sales_csv, "--windows", 40, "--out", out
    )
    assert code == 0, stderr
    assert "distance" in stdout
    table = pd.read_csv(out, dtype={"group": str})
    assert list(table["by"].unique()) == ["all", "hour", "weekday", "month", "series"]
    sums = table.groupby(["by", "group", "router"])["weight_share"].sum()
    assert np.allclose(sums, 1)
    counts = table[table["expert"] == 0].groupby("by")["windows"].sum()
    assert (counts == 40).all()


def test_benchmark_measures_every_batch_size_and_backend(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "speed.csv"
    code, stdout, stderr = run(
        "benchmark", covariate_model, "--batch-size", 1, "--batch-size", 3, "--backend", "torch",
        "--repeats", 2, "--profile", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, stderr
    assert "Self CPU" in stdout
    assert "Processor" in stderr
    table = pd.read_csv(out)
    assert table["Batch"].tolist() == [1, 3]
    assert list(table.columns)[2:8] == [
        "Batch", "First Run (sec)", "Second Run (sec)", "Compile Time (sec)",
        "Inference Time (sec)", "Throughput (batch*inf/sec)",
    ]  # fmt: skip
    assert np.allclose(
        table["Throughput (batch*inf/sec)"] * table["Inference Time (sec)"], table["Batch"]
    )
    assert (table["Latency 95% (ms)"] >= table["Latency Median (ms)"]).all()


def test_experts_below_a_share_are_left_out_and_the_change_is_told(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "smaller"
    arguments = ("prune", model_dir, "--data", sales_csv, "--out", out)
    code, stdout, stderr = run(*arguments, "--least-share", 0.9)
    assert code == 0, stderr
    assert "pruned" in stdout
    assert "CRPS " in stderr
    before, after = (load_model(folder).predictor.network for folder in (model_dir, out))
    assert before.router.num_experts > after.router.num_experts == 1
    code, _, stderr = run("predict", out, "--data", sales_csv, "--out", tmp_path / "f.csv")
    assert code == 0, stderr
    for more, message in (
        ((), "is there already"),
        (("--out", tmp_path / "x"), "no expert has a share of at most 0.0"),
        (("--out", tmp_path / "x", "--windows", 100), "of which --windows takes 600"),
        (("--out", tmp_path / "x", "--least-share", 1), "--least-share 1.0 leaves no expert"),
    ):
        code, _, stderr = run(*arguments, *more)
        assert code == 2
        assert message in " ".join(stderr.split())
        assert not (tmp_path / "x").exists()


def test_a_model_with_covariates_known_ahead_is_pruned(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "known.csv", tmp_path / "smaller"
    sales(hours=72).to_csv(data, index=False)
    code, _, stderr = run(
        "prune", covariate_model, "--data", data, "--out", out, "--least-share", 0.9
    )
    assert code == 0, stderr
    assert out.is_dir()
