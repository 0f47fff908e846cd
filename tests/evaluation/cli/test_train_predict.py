from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli_cases import COLUMNS, TINY, Run, sales
from moecast.evaluation import forecasts_to_frame, from_long_frame
from moecast.evaluation.cli.model_folder import MODELS, load_model
from moecast.evaluation.cli.progress import TrainingProgress
from moecast.evaluation.cli.signatures import (
    FROM_DATA,
    documented_parameters,
    estimator_parameters,
)
from moecast.forecasters import MoLEPredictor


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).predictor.network.state_dict()


def test_forecasts_are_those_of_the_python_interface(
    run: Run, sales_csv: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "forecasts.csv"
    code, _, stderr = run(
        "predict", model_dir, "--data", sales_csv, "--out", out, "--quantiles", "0.2,0.5"
    )
    assert code == 0, stderr
    written = pd.read_csv(out, dtype={"id": str}, parse_dates=["ds"])
    frame = sales()
    entries = from_long_frame(frame, timestamp="ds", target="y", item_id="id")
    predictor = MoLEPredictor.deserialize(model_dir)
    expected = forecasts_to_frame(
        predictor.predict(entries), [0.2, 0.5], item_id="id", timestamp="ds"
    )
    assert list(written.columns) == ["id", "ds", "mean", "0.2", "0.5"]
    pd.testing.assert_frame_equal(written, expected, check_dtype=False, rtol=1e-5)
    assert (written.groupby("id")["ds"].min() == frame["ds"].max() + pd.Timedelta(hours=1)).all()


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_table_format_holds_the_same_forecasts(
    ending: str, run: Run, sales_csv: Path, model_dir: Path, tmp_path: Path
) -> None:
    csv, other = tmp_path / "f.csv", tmp_path / f"f.{ending}"
    for out in (csv, other):
        assert run("predict", model_dir, "--data", sales_csv, "--out", out)[0] == 0
    read = pd.read_json(other, lines=ending == "jsonl", dtype={"id": str}, convert_dates=["ds"])
    assert np.allclose(read["0.9"], pd.read_csv(csv)["0.9"])
    assert list(read["id"].unique()) == ["000", "001", "002"]


def test_json_lines_and_parquet_are_read_as_the_csv_is(
    run: Run, sales_csv: Path, model_dir: Path, tmp_path: Path
) -> None:
    frame = sales()
    files = [sales_csv, tmp_path / "sales.jsonl"]
    frame.assign(ds=frame["ds"].astype(str)).to_json(files[1], orient="records", lines=True)
    try:
        frame.to_parquet(tmp_path / "sales.parquet")
        files.append(tmp_path / "sales.parquet")
    except ImportError:
        code, _, stderr = run("predict", model_dir, "--data", sales_csv, "--out", "f.parquet")
        assert code == 2
        assert "Parquet needs pyarrow" in stderr
    texts = []
    for number, file in enumerate(files):
        out = tmp_path / f"{number}.csv"
        code, _, stderr = run("predict", model_dir, "--data", file, "--out", out)
        assert code == 0, stderr
        texts.append(out.read_text())
    assert texts[1:] == texts[:-1]


def test_gluonts_json_lines_are_recognised(run: Run, model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "entries.jsonl"
    line = {"item_id": "x", "start": "2024-01-01 00:00", "target": list(range(30))}
    path.write_text(json.dumps(line) + "\n")
    out = tmp_path / "f.csv"
    code, _, stderr = run("predict", model_dir, "--data", path, "--out", out)
    assert code == 0, stderr
    assert pd.read_csv(out)["timestamp"][0] == "2024-01-02 06:00:00"


@pytest.mark.parametrize(
    ("dates", "following"),
    [
        (pd.date_range("2020-01-31", periods=40, freq="ME"), "2023-05-31"),
        (pd.date_range("2020-01-03", periods=40, freq="W-FRI"), "2020-10-09"),
        (pd.date_range("2020-01-01", periods=40, freq="MS"), "2023-05-01"),
    ],
    ids=["month ends", "Fridays", "month begins"],
)
def test_forecasts_are_dated_as_the_data_are(
    dates: pd.DatetimeIndex, following: str, run: Run, tmp_path: Path
) -> None:
    data, out = tmp_path / "data.csv", tmp_path / "f.csv"
    pd.DataFrame({"timestamp": dates, "target": np.arange(40.0)}).to_csv(data, index=False)
    code, _, stderr = run(
        "train", "mole", "--data", data, "--item-id", "", *TINY, "--max-steps", 1,
        "--out", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, stderr
    assert run("predict", tmp_path / "model", "--data", data, "--out", out)[0] == 0
    assert pd.read_csv(out)["timestamp"][0] == following


def test_covariates_known_ahead_reach_beyond_the_target(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    frame = sales(hours=66)
    first_unknown = frame["ds"].min() + pd.Timedelta(hours=60)
    frame.loc[frame["ds"] >= first_unknown, "y"] = np.nan
    data, out = tmp_path / "next.csv", tmp_path / "f.csv"
    frame.to_csv(data, index=False)
    code, _, stderr = run("predict", covariate_model, "--data", data, "--out", out)
    assert code == 0, stderr
    assert (pd.read_csv(out, parse_dates=["ds"])["ds"][:1] == first_unknown).all()
    before = pd.read_csv(out)["mean"]

    frame.loc[frame["ds"] >= first_unknown, "price"] = 50.0
    frame.to_csv(data, index=False)
    assert run("predict", covariate_model, "--data", data, "--out", out)[0] == 0
    assert not np.allclose(pd.read_csv(out)["mean"], before)


def test_categories_mean_the_same_in_the_next_file(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    frame = sales(hours=66)
    frame.loc[frame["ds"] >= frame["ds"].min() + pd.Timedelta(hours=60), "y"] = np.nan
    outs = []
    for name, part in (("all", frame), ("c", frame[frame["shop"] == "c"])):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
        out = tmp_path / f"{name}-forecasts.csv"
        code, _, stderr = run(
            "predict", covariate_model, "--data", tmp_path / f"{name}.csv", "--out", out
        )
        assert code == 0, stderr
        outs.append(pd.read_csv(out, dtype={"id": str}).set_index(["id", "ds"]))
    together, alone = outs
    pd.testing.assert_frame_equal(together.loc[["002"]], alone, rtol=1e-4)


def test_the_record_tells_how_the_model_was_made(model_dir: Path, sales_csv: Path) -> None:
    record = json.loads((model_dir / "moecast.json").read_text())
    assert record["reading"]["timestamp"] == "ds"
    assert record["reading"]["freq"] == "h"
    assert record["settings"]["num_experts"] == 2
    # 60 hours less two windows of 6.
    assert record["trained_until"] == {f"00{i}": "2024-01-02 23:00" for i in range(3)}
    assert record["files"] == [str(sales_csv)]
    assert len(record["training"]["loss"]) == 2


def test_the_seed_decides_the_weights(run: Run, sales_csv: Path, tmp_path: Path) -> None:
    made = []
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        options = [*TINY, "--seed", seed, "--max-steps", 2, "--out", tmp_path / name]
        assert run("train", "mole", "--data", sales_csv, *COLUMNS, *options)[0] == 0
        made.append(weights(tmp_path / name))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    run: Run, sales_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "mole", "--data", sales_csv, *COLUMNS, *TINY, "--epochs", 3]
    assert run(*command, "--out", tmp_path / "whole")[0] == 0

    def stop(self: TrainingProgress, trainer: object, *_: object) -> None:
        if trainer.current_epoch == 1:  # type: ignore[attr-defined]
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "on_train_epoch_start", stop, raising=False)
        with pytest.raises(RuntimeError, match="power cut"):
            run(*command, "--out", tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    code, _, stderr = run(*command, "--out", tmp_path / "stopped")
    assert code == 2
    assert "--resume" in stderr
    wider = [*command, "--num-experts", 3, "--out", tmp_path / "stopped", "--resume"]
    code, _, stderr = run(*wider)
    assert code == 2
    assert "do not fit the network" in " ".join(stderr.split())
    code, _, stderr = run(*command, "--out", tmp_path / "stopped", "--resume")
    assert code == 0, stderr
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_model_is_replaced_only_when_told(run: Run, sales_csv: Path, tmp_path: Path) -> None:
    command = ["train", "mole", "--data", sales_csv, *COLUMNS, *TINY, "--max-steps", 1]
    out = tmp_path / "model"
    assert run(*command, "--out", out)[0] == 0
    before = (out / "moecast.json").read_text()
    code, _, stderr = run(*command, "--num-experts", 3, "--out", out)
    assert code == 2
    assert "--overwrite" in stderr
    assert (out / "moecast.json").read_text() == before
    assert run(*command, "--num-experts", 3, "--out", out, "--overwrite")[0] == 0
    assert json.loads((out / "moecast.json").read_text())["settings"]["num_experts"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("model", ["moirai-moe", "autoformer"])
def test_the_other_models_train_and_predict(
    model: str, run: Run, sales_csv: Path, tmp_path: Path
) -> None:
    options = {
        "moirai-moe": ["--d-model", 8, "--d-ff", 8, "--num-layers", 1, "--num-heads", 2,
                       "--num-samples", 4, "--patch-size", 4],
        "autoformer": ["--d-model", 8, "--d-ff", 8, "--num-heads", 2, "--top-k", "none",
                       "--patch-size", "2,3"],
    }  # fmt: skip
    code, _, stderr = run(
        "train", model, "--data", sales_csv, *COLUMNS, "--prediction-length", 6,
        "--context-length", 12, "--num-experts", 2, "--max-steps", 2, "--accelerator", "cpu",
        "--head", "normal", *options[model], "--out", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, stderr
    out = tmp_path / "f.csv"
    assert run("predict", tmp_path / "model", "--data", sales_csv, "--out", out)[0] == 0
    forecasts = pd.read_csv(out)
    assert len(forecasts) == 18
    assert (forecasts["0.1"] <= forecasts["0.9"]).all()


def test_a_known_data_set_brings_its_reading_and_horizon(run: Run, tmp_path: Path) -> None:
    dates = pd.date_range("1949-01", periods=144, freq="MS").strftime("%Y-%m")
    frame = pd.DataFrame({"Date": dates, "Passengers": np.arange(144)})
    frame.to_csv(tmp_path / "AirPassengers.csv", index=False)
    out = tmp_path / "model"
    code, _, stderr = run(
        "train", "mole", "--dataset", "air_passengers", "--data-dir", tmp_path,
        "--num-experts", 2, "--max-steps", 1, "--accelerator", "cpu", "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    record = json.loads((out / "moecast.json").read_text())
    assert record["settings"]["prediction_length"] == 12
    assert record["reading"]["format"] == "wide"
    # The next file is a wide one, too.
    forecasts = tmp_path / "f.csv"
    code, _, stderr = run(
        "predict", out, "--data", tmp_path / "AirPassengers.csv", "--out", forecasts
    )
    assert code == 0, stderr
    assert pd.read_csv(forecasts)["timestamp"][0] == "1961-01-01"


@pytest.mark.parametrize("model", MODELS)
def test_every_constructor_argument_is_an_option(model: str) -> None:
    cls = MODELS[model]
    arguments = set(inspect.signature(cls.__init__).parameters) - {"self"}
    options = {parameter.name: parameter for parameter in estimator_parameters(cls)}
    assert arguments - options.keys() == FROM_DATA | {"train_sampler", "validation_sampler"}
    for name, option in options.items():
        assert option.default == inspect.signature(cls.__init__).parameters[name].default
        (settings,) = option.annotation.__metadata__
        assert settings.help, f"{name} is not documented"


def test_help_is_the_docstrings(run: Run) -> None:
    code, stdout, _ = run("train", "autoformer", "--help")
    assert code == 0
    text = " ".join(stdout.replace("│", " ").split())
    assert "--moving-average" in text
    assert "--head" in text
    assert "default: 4" in text


def test_documented_parameters_reads_numpydoc() -> None:
    class Documented:
        """Summary.

        Parameters
        ----------
        first, second : int
            Both of ``them``,
            on two lines: see :class:`Other`.
        third
            As for :class:`Other`.
        **shared
            More.

        Raises
        ------
        ValueError
            Never.
        """

    assert documented_parameters(Documented) == {
        "first": "Both of them, on two lines: see Other.",
        "second": "Both of them, on two lines: see Other.",
    }
