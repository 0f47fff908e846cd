"""Bad input of every command: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from cli_cases import COLUMNS, TINY, Run, sales
from moecast.forecasters import MoLEEstimator

Damage = Callable[[pd.DataFrame], pd.DataFrame]


def with_bad_date(frame: pd.DataFrame) -> pd.DataFrame:
    dates = frame["ds"].astype(str)
    dates[4] = "31.31.2024"
    return frame.assign(ds=dates)


def with_mixed_frequencies(frame: pd.DataFrame) -> pd.DataFrame:
    days = pd.date_range("2024-01-01", periods=30, freq="D")
    daily = pd.DataFrame({"id": "daily", "ds": days, "y": 1.0, "price": 1.0, "shop": "a"})
    return pd.concat([frame, daily])


def hourly_then_daily(frame: pd.DataFrame) -> pd.DataFrame:
    days = pd.date_range("2024-02-01", periods=60, freq="D")
    daily = pd.DataFrame({"id": "000", "ds": days, "y": 1.0, "price": 1.0, "shop": "a"})
    return pd.concat([frame[frame["id"] == "000"], daily])


DAMAGED: dict[str, tuple[Damage, str]] = {
    "bad date": (with_bad_date, "'31.31.2024', which is not a date, in row 5"),
    "bad number": (
        lambda f: f.assign(y=f["y"].astype(object).where(f.index != 2, "many")),
        "column 'y' holds 'many', which is not a number, in row 3",
    ),
    "no such column": (
        lambda f: f.rename(columns={"ds": "dss"}),
        "no column 'ds'; did you mean 'dss'",
    ),
    "mixed frequencies": (with_mixed_frequencies, "typically 24 steps apart at freq='h'"),
    "mixed frequency": (hourly_then_daily, "partly of freq="),
    "repeated": (lambda f: pd.concat([f, f[:1]]), "two rows for 2024-01-01 00:00"),
    "no rows": (lambda f: f[:0], "there are no rows"),
    "unnamed item": (lambda f: f.assign(id=f["id"].where(f.index > 0)), "name every row's item"),
}


@pytest.fixture
def damaged_csv(tmp_path: Path) -> Callable[[str], Path]:
    def write(damage: str) -> Path:
        path = tmp_path / "data" / "sales.csv"
        path.parent.mkdir()
        DAMAGED[damage][0](sales()).to_csv(path, index=False)
        return path

    return write


def refused(run: Run, folder: Path, *arguments: object) -> str:
    """The sentence on standard error; nothing new is in the folder."""
    before = sorted(folder.rglob("*"))
    code, stdout, stderr = run(*arguments)
    assert code == 2, stderr
    assert sorted(folder.rglob("*")) == before
    assert stdout == ""
    text = " ".join(stderr.split())
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_data_are_refused_by_training(
    damage: str, run: Run, damaged_csv: Callable[[str], Path], tmp_path: Path
) -> None:
    text = refused(
        run, tmp_path, "train", "mole", "--data", damaged_csv(damage), *COLUMNS, *TINY,
        "--out", tmp_path / "out" / "model",
    )  # fmt: skip
    assert DAMAGED[damage][1] in text
    assert text.count("error:") == 1
    assert "sales.csv: " in text


@pytest.mark.parametrize("command", ["predict", "evaluate", "experts"])
@pytest.mark.parametrize("damage", ["bad date", "no such column", "repeated"])
def test_damaged_data_are_refused_by_what_reads_a_model(
    damage: str,
    command: str,
    run: Run,
    model_dir: Path,
    damaged_csv: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    text = refused(
        run, tmp_path, command, model_dir, "--data", damaged_csv(damage),
        "--out", tmp_path / "out" / "result.csv",
    )  # fmt: skip
    assert DAMAGED[damage][1] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.csv"], "missing.csv: there is no such file"),
        (["--data", "missing.parquet"], "missing.parquet: there is no such file"),
        (["--data", "missing.jsonl"], "missing.jsonl: there is no such file"),
        (["--dataset", "ETTh2"], "no data set is known as 'ETTh2'; did you mean 'ETTh1'"),
        (["--dataset", "ETTh1", "--data-dir", "nowhere"], "ETTh1.csv is not in nowhere"),
        ([], "give either --data FILE or --dataset NAME"),
        (["--target", "sales"], "no column 'sales'"),
        (["--prediction-length", "90"], "the longest series has 60 values"),
        (["--holdout", "10"], "has 60 values, of which --holdout takes 60"),
        (["--num-experts", "99"], "mole cannot be made: num_experts=99"),
        (["--top-k", "many"], "--top-k"),
        (["--head", "studnet"], "studnet"),
        (["--head", "beta"], "between 0 and 1"),
        (["--trainer-kwargs", "[1]"], "is no JSON object"),
        (["--freq", "fortnight"], "freq='fortnight'"),
        (["--irregular", "mend"], "--irregular 'mend'"),
        (["--backend", "abacus"], "abacus"),
        (["--resume"], "--resume: there is no stopped training"),
        (["--format", "m4"], "does not state the frequency"),
        (["--feat-static-cat", "price"], "static column 'price' has"),
        (["--epochs", "0"], "--epochs"),
    ],
)
def test_bad_options_of_training(
    options: list[str],
    message: str,
    run: Run,
    sales_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names_data = not options or {"--data", "--dataset"} & set(options)
    data = [] if names_data else ["--data", sales_csv]
    text = refused(
        run, tmp_path, "train", "mole", *data, *COLUMNS, *TINY, *options, "--out", "out/model"
    )
    assert message in text


def test_the_horizon_is_asked_for(run: Run, sales_csv: Path, tmp_path: Path) -> None:
    text = refused(
        run, tmp_path, "train", "mole", "--data", sales_csv, *COLUMNS, "--out", tmp_path / "model"
    )
    assert "--prediction-length is missing" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no series has a window"), 2), (SystemExit(), 1), (SystemExit(3), 3)],
    ids=["input", "SIGTERM", "exit"],
)
def test_what_ends_a_training_before_its_first_step(
    error: BaseException,
    code: int,
    run: Run,
    sales_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    # Lightning turns SIGTERM into a SystemExit without a code.
    monkeypatch.setattr(MoLEEstimator, "train", stop)
    out = tmp_path / "model"
    found, _, stderr = run("train", "mole", "--data", sales_csv, *COLUMNS, *TINY, "--out", out)
    assert found == code
    assert ("no series has a window" in stderr) == (code == 2)
    assert not list(tmp_path.iterdir())


def test_training_refuses_an_infinite_value_before_it_starts(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    frame = sales()
    frame.loc[3, "y"] = np.inf
    frame.to_csv(data, index=False)
    text = refused(
        run, tmp_path, "train", "mole", "--data", data, *COLUMNS, *TINY, "--out", tmp_path / "m"
    )
    assert "infinite at step 3" in text


@pytest.mark.parametrize("command", ["predict", "evaluate", "experts", "benchmark"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", "there is no such folder"),
        ("empty", "not a model folder"),
        ("newer", "written by moecast 9.0 in format 2"),
        ("other class", "holds a moecast.forecasters.Other"),
        ("no weights", "has no file 'model.safetensors'"),
        ("damaged record", "moecast.json is damaged"),
        ("damaged settings", "predictor.json is damaged"),
    ],
)
def test_folders_that_are_no_models_of_this_version(
    spoil: str,
    message: str,
    command: str,
    run: Run,
    model_dir: Path,
    sales_csv: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    if spoil == "empty":
        folder.mkdir()
    elif spoil != "missing":
        shutil.copytree(model_dir, folder)
        record, config = folder / "moecast.json", folder / "gluonts-config.json"
        if spoil == "newer":
            record.write_text(json.dumps({"format": 2, "moecast": "9.0"}))
        elif spoil == "other class":
            described = json.loads(config.read_text())
            config.write_text(json.dumps({**described, "type": "moecast.forecasters.Other"}))
        elif spoil == "no weights":
            (folder / "model.safetensors").unlink()
        elif spoil == "damaged record":
            record.write_text("{")
        else:
            settings = folder / "predictor.json"
            settings.write_text(settings.read_text().replace("hidden_dimension", "hidden_width"))
    data = [] if command == "benchmark" else ["--data", sales_csv]
    text = refused(run, tmp_path, command, folder, *data, "--out", tmp_path / "out.csv")
    assert message in text


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("predict", ["--quantiles", "0.1,1.5"], "'1.5' is no number between 0 and 1"),
        ("predict", ["--out", "f.xlsx"], "f.xlsx: a table is written as .csv"),
        ("predict", ["--timestamp", "when"], "no column 'when'"),
        ("evaluate", ["--windows", "30"], "series '000' has 60 values"),
        ("evaluate", ["--prediction-length", "7"], "the horizons differ (tiny: 6"),
        ("evaluate", ["--forecaster", "dliner"], "there is no such class"),
        ("evaluate", ["--forecaster", "tiny=dlinear"], "a model folder is named 'tiny'"),
        ("experts", ["--by", "hours"], "--by 'hours': did you mean 'hour'"),
        ("benchmark", ["--backend", "tpu"], "--backend 'tpu'"),
        ("benchmark", ["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_options_of_what_reads_a_model(
    command: str,
    options: list[str],
    message: str,
    run: Run,
    model_dir: Path,
    sales_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if command == "benchmark" else ["--data", sales_csv]
    assert message in refused(run, tmp_path, command, model_dir, *data, *options)


def test_prediction_needs_the_covariates_of_the_horizon(
    run: Run, covariate_model: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.csv"
    text = refused(run, tmp_path, "predict", covariate_model, "--data", sales_csv, "--out", out)
    assert "item '000': feat_dynamic_real has 60 steps, but needs 66" in text


def test_data_of_another_frequency_than_the_models(
    run: Run, model_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.csv"
    days = pd.date_range("2024-01-01", periods=60, freq="D")
    pd.DataFrame({"id": "a", "ds": days, "y": 1.0}).to_csv(data, index=False)
    text = refused(run, tmp_path, "predict", model_dir, "--data", data)
    assert "of freq='D', but the model was trained on freq='h'" in text
    code, _, stderr = run("predict", model_dir, "--data", data, "--freq", "h")
    assert code == 0
    assert "1357 timestamps missing in 1 items" in " ".join(stderr.split())


def test_a_category_unknown_to_the_model_is_named(
    run: Run, covariate_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.csv"
    sales("az").to_csv(data, index=False)
    text = refused(run, tmp_path, "predict", covariate_model, "--data", data)
    assert "item '001': static column 'shop' is 'z', which is none of the known" in text


def test_a_file_that_fails_to_be_written_leaves_the_old_one(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.csv"
    out.write_text("old\n")

    def fail(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("hal")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        run("predict", model_dir, "--data", sales_csv, "--out", out)
    assert out.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "ttnn"), "backend='ttnn' cannot be had: "),
        (("--trainer-kwargs", '{"max_epoch": 1}'), "'max_epoch': did you mean 'max_epochs'"),
    ],
)
def test_what_the_machine_or_lightning_lacks_is_a_sentence(
    options: tuple[str, str], message: str, run: Run, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "model"
    text = refused(
        run, tmp_path, "train", "mole", "--data", sales_csv, *COLUMNS, *TINY, *options, "--out", out
    )
    assert message in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(
    run: Run, model_dir: Path, sales_csv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.csv"
    text = refused(
        run, tmp_path, "predict", model_dir, "--data", sales_csv, "--device", "cuda", "--out", out
    )
    assert "--device cuda: " in text
