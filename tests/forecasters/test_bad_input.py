"""Settings, data and folders that cannot work: each message names field, value and remedy."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from gluonts.model.predictor import Predictor
from gluonts.torch.distributions import GammaOutput
from gluonts.torch.model.predictor import PyTorchPredictor
from model_cases import HORIZON, MODELS, Factory, series
from moecast.forecasters import MoEEstimator, MoEPredictor

SETTINGS = {
    "horizon 0": ({"prediction_length": 0}, ["prediction_length=0", "at least 1"]),
    "horizon -3": ({"prediction_length": -3}, ["prediction_length=-3", "at least 1"]),
    "context 0": ({"context_length": 0}, ["context_length=0", "at least 1"]),
    "context -1": ({"context_length": -1}, ["context_length=-1", "at least 1"]),
    "lead time": ({"lead_time": -1}, ["lead_time=-1", "not be negative"]),
    "channels": ({"target_dim": 0}, ["target_dim=0", "at least 1"]),
    "covariates": ({"num_feat_dynamic_real": -1}, ["num_feat_dynamic_real=-1", "negative"]),
    "cardinality": (
        {"num_feat_static_cat": 2, "cardinality": [3]},
        ["num_feat_static_cat=2", "cardinality", "[3]"],
    ),
    "category of nothing": (
        {"num_feat_static_cat": 1, "cardinality": [0]},
        ["cardinality=[0]", "at least 1"],
    ),
    "frequency": ({"freq": "fortnight"}, ["freq='fortnight'", "'h'", "'M'"]),
    "frequency without candidates": (
        {"freq": "ms", "patch_size": "auto", "context_length": 64},
        ["freq='ms'", "patch_size", "number"],
    ),
    "patch size by another name": ({"patch_size": "large"}, ["patch_size='large'", "'auto'"]),
    "patch size 0": ({"patch_size": 0}, ["patch_size=0", "between 1 and context_length"]),
    "patch size beyond context": (
        {"patch_size": 17, "context_length": 16},
        ["patch_size=17", "context_length=16"],
    ),
    "head": ({"distr_output": "cauchy"}, ["distr_output='cauchy'", "student_t", "path"]),
    "head by the path of something else": (
        {"distr_output": "gluonts.model.Forecast"},
        ["distr_output='gluonts.model.Forecast'", "student_t"],
    ),
    "head that needs arguments": (
        {"distr_output": "gluonts.torch.distributions.QuantileOutput"},
        ["QuantileOutput", "does not take these arguments", "quantiles"],
    ),
    "scaling": ({"scaling": "max"}, ["scaling='max'", "std", "mean", "none"]),
    "scaling off the support": (
        {"scaling": "std", "distr_output": "negative_binomial"},
        ["scaling='std'", "NegativeBinomialOutput", "'mean'"],
    ),
    "backend": ({"backend": "abacus"}, ["backend='abacus'", "torch"]),
    "schedule": ({"lr_schedule": "up"}, ["lr_schedule='up'", "one_cycle"]),
    "learning rate": ({"lr": 0.0}, ["lr=0.0", "positive"]),
    "weight decay": ({"weight_decay": -1.0}, ["weight_decay=-1.0", "negative"]),
    "balance": ({"aux_weight": -1.0}, ["aux_weight=-1.0", "negative"]),
    "batch": ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
    "batches": ({"num_batches_per_epoch": 0}, ["num_batches_per_epoch=0", "at least 1"]),
    "patience": ({"early_stopping_patience": 0}, ["early_stopping_patience=0", "at least 1"]),
    "calibration": ({"calibration_windows": -1}, ["calibration_windows=-1", "negative"]),
    "calibration without a distribution": (
        {"calibration_windows": 2, "distr_output": "quantile"},
        ["calibration_windows=2", "QuantileOutput"],
    ),
    "calibration of samples": (
        {"calibration_windows": 2, "distr_output": GammaOutput()},
        ["calibration_windows=2", "GammaOutput"],
    ),
    "endless one-cycle": (
        {"trainer_kwargs": {"max_epochs": -1}, "lr_schedule": "one_cycle"},
        ["one_cycle", "max_epochs", "constant"],
    ),
}

MOLE_SETTINGS = {
    "expert": ({"expert": "nlinear"}, ["expert='nlinear'", "dlinear", "rlinear", "rmlp"]),
    "router": ({"router": "oracle"}, ["router='oracle'", "calendar", "statistics", "window"]),
    "no experts": ({"num_experts": 0}, ["num_experts=0", "between 1 and 16"]),
    "too many experts": ({"num_experts": 17}, ["num_experts=17", "between 1 and 16"]),
    "top-k beyond experts": (
        {"top_k": 5, "num_experts": 4},
        ["top_k=5", "num_experts=4", "leave it out"],
    ),
    "top-0": ({"top_k": 0}, ["top_k=0", "between 1"]),
    "noise without top-k": ({"noisy_routing": True}, ["noisy_routing=True", "top_k"]),
    "head dropout": ({"head_dropout": 1.0}, ["head_dropout=1.0", "[0, 1)"]),
    "dropout": ({"dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
    "moving average": ({"moving_average": 0}, ["moving_average=0", "at least 1"]),
    "width": ({"hidden_dimension": 0}, ["hidden_dimension=0", "at least 1"]),
    "calendar without features": (
        {"router": "calendar", "freq": "ms"},
        ["router='calendar'", "freq='ms'", "'window'"],
    ),
}


AUTOFORMER_SETTINGS = {
    **{
        name: ({name: number}, [f"{name}={number}", "at least 1"])
        for name, number in {
            "d_model": 0,
            "d_ff": 0,
            "num_heads": -1,
            "num_encoder_layers": 0,
            "num_decoder_layers": 0,
            "label_length": 0,
            "wavelet_levels": 0,
        }.items()
    },
    "label beyond context": (
        {"label_length": 17, "context_length": 16},
        ["label_length=17", "at most context_length=16"],
    ),
    "width of a head": (
        {"d_model": 10, "num_heads": 4},
        ["d_model=10", "multiple of num_heads=4"],
    ),
    "even average": ({"moving_average": 4}, ["moving_average=4", "odd", "at least 3"]),
    "average of one": ({"moving_average": 1}, ["moving_average=1", "odd", "at least 3"]),
    "no delays": ({"delay_factor": 0.0}, ["delay_factor=0.0", "positive"]),
    "NaN delays": ({"delay_factor": float("nan")}, ["delay_factor=nan", "positive"]),
    "dropout of all": ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
    "negative dropout": ({"dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
    "decomposition": (
        {"decomposition": "stl"},
        ["decomposition='stl'", "'input'", "'layers'", "None"],
    ),
    "no experts": ({"num_experts": 0}, ["num_experts=0", "at least 1"]),
    "top-k beyond experts": (
        {"top_k": 5, "num_experts": 4},
        ["top_k=5", "num_experts=4", "leave it out"],
    ),
    "top-0": ({"top_k": 0}, ["top_k=0", "between 1"]),
    "wavelet": ({"wavelet": "daubechies"}, ["wavelet='daubechies'", "'db4'", "None"]),
    "continuous wavelet": ({"wavelet": "morl"}, ["wavelet='morl'", "discrete", "'haar'"]),
    "wavelet that is cut off": ({"wavelet": "dmey"}, ["wavelet='dmey'", "back", "'haar'"]),
}


def check_message(error: pytest.ExceptionInfo, parts: list[str]) -> None:
    message = str(error.value)
    for part in parts:
        assert part in message, message
    assert len(message) < 600, message


@pytest.mark.parametrize("case", list(SETTINGS))
def test_setting(make_estimator: Factory, case: str) -> None:
    settings, parts = SETTINGS[case]
    if case == "endless one-cycle":
        quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
        settings = {**settings, "trainer_kwargs": {**quiet, **settings["trainer_kwargs"]}}
    with pytest.raises(ValueError, match=r".") as error:
        make_estimator(**settings).train(series())
    check_message(error, parts)


@pytest.mark.parametrize("case", list(MOLE_SETTINGS))
def test_mole_setting(case: str) -> None:
    settings, parts = MOLE_SETTINGS[case]
    with pytest.raises(ValueError, match=r".") as error:
        MODELS["mole rmlp"](**settings)
    check_message(error, parts)


@pytest.mark.parametrize("case", list(AUTOFORMER_SETTINGS))
def test_autoformer_setting(case: str) -> None:
    settings, parts = AUTOFORMER_SETTINGS[case]
    with pytest.raises(ValueError, match=r".") as error:
        MODELS["autoformer"](**settings)
    check_message(error, parts)


@pytest.mark.parametrize("number", [0, -1])
def test_number_of_samples_of_a_predictor(predictor: MoEPredictor, number: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples={number} must be at least 1"):
        type(predictor)(network=predictor.network, num_samples=number)


def test_unknown_setting_is_refused(make_estimator: Factory) -> None:
    with pytest.raises((TypeError, ValueError), match="num_expert_heads"):
        make_estimator(num_expert_heads=3)


def test_unknown_backend_of_the_environment(
    make_estimator: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*torch"):
        make_estimator()


def changed(**fields: Any) -> list[dict]:
    """Good series, of which the second has other fields; ``None`` leaves one out."""
    entries = series()
    entries[1] = {**entries[1], **fields}
    entries[1] = {name: value for name, value in entries[1].items() if value is not None}
    return entries


def target_with(value: float, *, step: int = 50) -> np.ndarray:
    target = series()[1]["target"].astype(np.float64)
    target[step] = value
    return target


LENGTH = len(series()[1]["target"])
KNOWN = {"num_feat_dynamic_real": 2}
PAST = {"num_past_feat_dynamic_real": 1}
STATIC = {"num_feat_static_real": 2}
CATEGORIES = {"num_feat_static_cat": 1, "cardinality": [3]}

# What is wrong with the second of four series: settings, its fields, and what the message says.
DATA: dict[str, tuple[dict, dict, list[str]]] = {
    "no target": ({}, {"target": None}, ["'target'", "'series 1'"]),
    "no start": ({}, {"start": None}, ["'start'", "'series 1'"]),
    "start that is no date": (
        {},
        {"start": "yesterday"},
        ["'series 1'", "start='yesterday'"],
    ),
    "start of another frequency": (
        {},
        {"start": pd.Period("2024-01-01", freq="D")},
        ["'series 1'", "'D'", "freq='h'", "resample"],
    ),
    "start of another multiple": (
        {},
        {"start": pd.Period("2024-01-01", freq="2h")},
        ["'series 1'", "2h", "freq='h'"],
    ),
    "all missing": (
        {},
        {"target": np.full(LENGTH, np.nan)},
        ["'series 1'", "target", "no observed value", str(LENGTH), "leave"],
    ),
    "infinite": (
        {},
        {"target": target_with(np.inf)},
        ["'series 1'", "target", "infinite", "step 50", "NaN"],
    ),
    "minus infinite": (
        {},
        {"target": target_with(-np.inf)},
        ["'series 1'", "target", "infinite", "step 50", "NaN"],
    ),
    "too large for 32 bits": (
        {},
        {"target": target_with(1e300)},
        ["'series 1'", "target", "infinite", "step 50"],
    ),
    "words": ({}, {"target": ["a", "b"]}, ["'series 1'", "target", "numbers"]),
    "several channels": (
        {},
        {"target": np.zeros((3, LENGTH))},
        ["'series 1'", "target", f"[3, {LENGTH}]", "target_dim"],
    ),
    "too few channels": (
        {"target_dim": 2},
        {},
        ["'series 0'", "target", "[2, time]", "target_dim"],
    ),
    "covariate missing": (KNOWN, {}, ["'series 0'", "'feat_dynamic_real'"]),
    "past covariate missing": (PAST, {}, ["'series 0'", "'past_feat_dynamic_real'"]),
    "static feature missing": (STATIC, {}, ["'series 0'", "'feat_static_real'"]),
    "category missing": (CATEGORIES, {}, ["'series 0'", "'feat_static_cat'"]),
}

FEATURES_OF_ALL = {
    "feat_dynamic_real": lambda steps: np.ones((2, steps)),
    "past_feat_dynamic_real": lambda steps: np.ones((1, steps)),
    "feat_static_real": lambda steps: [1.0, 2.0],
    "feat_static_cat": lambda steps: [0],
}

FEATURE_DATA: dict[str, tuple[dict, dict, list[str]]] = {
    "too many covariates": (
        KNOWN,
        {"feat_dynamic_real": np.ones((3, LENGTH + HORIZON))},
        ["'series 1'", "feat_dynamic_real", f"[3, {LENGTH + HORIZON}]", "num_feat_dynamic_real"],
    ),
    "covariate too short": (
        KNOWN,
        {"feat_dynamic_real": np.ones((2, LENGTH - 1))},
        ["'series 1'", "feat_dynamic_real", f"{LENGTH - 1} steps", str(LENGTH)],
    ),
    "infinite covariate": (
        KNOWN,
        {"feat_dynamic_real": np.full((2, LENGTH + HORIZON), np.inf)},
        ["'series 1'", "feat_dynamic_real", "infinite", "NaN"],
    ),
    "past covariate too short": (
        PAST,
        {"past_feat_dynamic_real": np.ones((1, LENGTH - 1))},
        ["'series 1'", "past_feat_dynamic_real", f"{LENGTH - 1} steps", str(LENGTH)],
    ),
    "too few static features": (
        STATIC,
        {"feat_static_real": [1.0]},
        ["'series 1'", "feat_static_real", "[1]", "[2]"],
    ),
    "words as static features": (
        STATIC,
        {"feat_static_real": ["red", "blue"]},
        ["'series 1'", "feat_static_real", "numbers"],
    ),
    "unknown category": (
        CATEGORIES,
        {"feat_static_cat": [3]},
        ["'series 1'", "feat_static_cat[0]=3", "cardinality=[3]"],
    ),
    "negative category": (
        CATEGORIES,
        {"feat_static_cat": [-1]},
        ["'series 1'", "feat_static_cat[0]=-1", "0…2"],
    ),
    "word as category": (
        CATEGORIES,
        {"feat_static_cat": ["red"]},
        ["'series 1'", "feat_static_cat", "numbers"],
    ),
    "missing category": (
        CATEGORIES,
        {"feat_static_cat": [np.nan]},
        ["'series 1'", "feat_static_cat"],
    ),
    "fraction of a category": (
        CATEGORIES,
        {"feat_static_cat": [1.5]},
        ["'series 1'", "feat_static_cat", "1.5"],
    ),
}


def with_features(fields: dict) -> list[dict]:
    entries = series()
    for entry in entries:
        for name, make in FEATURES_OF_ALL.items():
            entry[name] = make(len(entry["target"]) + HORIZON)
    entries[1] = {**entries[1], **fields}
    return entries


def wrong_data(case: str) -> tuple[dict, list[dict], list[str]]:
    if case in DATA:
        settings, fields, parts = DATA[case]
        return settings, changed(**fields), parts
    settings, fields, parts = FEATURE_DATA[case]
    return settings, with_features(fields), parts


def use_for(use: str, estimator: MoEEstimator, entries: list[dict]) -> None:
    if use == "train":
        estimator.train(entries)
    elif use == "validate":
        good = with_features({})
        for entry in good:
            entry["target"] = np.tile(entry["target"], (estimator.window.target_dim, 1))
        estimator.train(good, entries)
    else:
        module = estimator.create_lightning_module()
        list(estimator.create_predictor(None, module).predict(entries))


@pytest.mark.parametrize("use", ["train", "validate", "predict"])
@pytest.mark.parametrize("case", [*DATA, *FEATURE_DATA])
def test_data(case: str, use: str) -> None:
    """The checks are shared by all models, so that one is enough here."""
    settings, entries, parts = wrong_data(case)
    estimator = MODELS["mole rmlp"](**settings)
    with pytest.raises(ValueError, match=r".") as error:
        use_for(use, estimator, entries)
    check_message(error, parts)


def test_covariate_that_ends_with_the_history(make_estimator: Factory) -> None:
    estimator = make_estimator(num_feat_dynamic_real=2, lead_time=3)
    predictor = estimator.create_predictor(None, estimator.create_lightning_module())
    entries = series(features=True, beyond=3 + HORIZON - 1)
    with pytest.raises(ValueError, match=r".") as error:
        list(predictor.predict(entries))
    length = len(entries[0]["target"])
    check_message(
        error,
        [
            "'series 0'",
            "feat_dynamic_real",
            f"{length + 3 + HORIZON - 1} steps",
            f"{length} steps",
            f"{3 + HORIZON} steps of lead_time and prediction_length",
        ],
    )


def test_item_without_id_is_named_by_its_position(predictor: MoEPredictor) -> None:
    entries = series(number=12)
    for entry in entries:
        del entry["item_id"]
    entries[10]["target"][:] = np.nan
    with pytest.raises(ValueError, match=r"item 10: .*target"):
        list(predictor.predict(entries))


def test_good_series_before_a_bad_one_are_forecast(predictor: MoEPredictor) -> None:
    entries = series(number=12)
    entries[10]["target"][:] = np.nan
    forecasts = predictor.predict(entries)
    assert [next(forecasts).item_id for _ in range(8)] == [f"series {i}" for i in range(8)]
    with pytest.raises(ValueError, match="series 10"):
        next(forecasts)


def test_empty_training_dataset(make_estimator: Factory) -> None:
    with pytest.raises(ValueError, match="training dataset is empty"):
        make_estimator().train([])


def test_empty_validation_dataset(make_estimator: Factory) -> None:
    with pytest.raises(ValueError, match="validation dataset is empty"):
        make_estimator().train(series(), [])


@pytest.mark.parametrize(
    ("head", "value", "needed"),
    [
        ("negative_binomial", -1.0, "whole numbers of at least 0"),
        ("negative_binomial", 2.5, "whole numbers of at least 0"),
        ("gluonts.torch.distributions.GammaOutput", -1.0, "at least 0"),
        ("gluonts.torch.distributions.BetaOutput", 2.0, "between 0 and 1"),
    ],
)
def test_values_that_the_head_cannot_have(
    make_estimator: Factory, head: str, value: float, needed: str
) -> None:
    """Said at the first look at the data, wherever the value stands, in training and validation."""
    fine = [{**entry, "target": np.zeros(60)} for entry in series()]
    broken = [{**entry, "target": entry["target"].copy()} for entry in fine]
    broken[2]["target"][:2] = np.nan, value
    message = rf"item .*: its target is {value:g} at step 1.*{needed}"
    estimator = make_estimator(distr_output=head)
    with pytest.raises(ValueError, match=message):
        estimator.train(broken)
    with pytest.raises(ValueError, match=message):
        estimator.train(fine, broken)


def test_what_is_no_dataset(make_estimator: Factory) -> None:
    frame = pd.DataFrame({"target": np.arange(60.0)})
    with pytest.raises(ValueError, match=r"item 0 is of type str.*PandasDataset"):
        make_estimator().train(frame)


def test_no_series_long_enough(make_estimator: Factory) -> None:
    short = [{**entry, "target": entry["target"][:HORIZON]} for entry in series()]
    with pytest.raises(ValueError, match=r"no window to train on.*4 series.*prediction_length=4"):
        make_estimator().train(short)
    with pytest.raises(ValueError, match=r"no window to validate on.*4 series"):
        make_estimator().train(series(), short)


def test_series_without_steps_cannot_be_forecast(predictor: MoEPredictor) -> None:
    with pytest.raises(ValueError, match=r"'series 1'.*target.*leave the item out"):
        list(predictor.predict(changed(target=np.zeros(0))))


class StillRunning(BaseException):
    """Passes through what handles exceptions."""


@contextmanager
def gives_up_after(seconds: float) -> Iterator[None]:
    """Fails a test that would otherwise never end."""

    def stop(number: int, frame: object) -> None:
        raise StillRunning

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    except StillRunning:
        signal.setitimer(signal.ITIMER_REAL, 0)
        pytest.fail(f"it still runs after {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_no_series_long_enough_in_a_stream() -> None:
    short = [{**entry, "target": entry["target"][:HORIZON]} for entry in series()]
    with gives_up_after(10), pytest.raises(ValueError, match="no window to train on"):
        MODELS["mole rmlp"](max_dataset_bytes=1).train(short)


def test_stream_that_can_be_read_only_once() -> None:
    once = (entry for entry in series())
    with gives_up_after(10), pytest.raises(ValueError, match=r"again|once"):
        MODELS["mole rmlp"](max_dataset_bytes=1).train(once)


FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (lambda folder: _remove(folder), ["no folder"]),
    "empty": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        ["no serialised predictor", "gluonts-config.json"],
    ),
    "without weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["model.safetensors"],
    ),
    "weights cut off": (
        lambda folder: _rewrite(folder / "model.safetensors", lambda content: content[:-40]),
        ["model.safetensors", "damaged"],
    ),
    "weights of nothing": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ["model.safetensors", "damaged"],
    ),
    "description cut off": (
        lambda folder: _rewrite(folder / "predictor.json", lambda content: content[:-40]),
        ["damaged"],
    ),
    "description of something else": (
        lambda folder: (folder / "predictor.json").write_text("[1, 2]"),
        ["predictor.json", "describes no"],
    ),
    "description that is no text": (
        lambda folder: (folder / "predictor.json").write_bytes(b"\xff\xfe\x00\x80"),
        ["predictor.json", "damaged"],
    ),
    "description without a setting": (
        lambda folder: _edit(folder, lambda encoded: encoded["kwargs"].pop("network")),
        ["predictor.json", "damaged"],
    ),
    "other type": (
        lambda folder: (folder / "gluonts-config.json").write_text(
            json.dumps({"type": "gluonts.model.trivial.mean.MeanPredictor"})
        ),
        ["MeanPredictor"],
    ),
}


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _edit(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "predictor.json"
    encoded = json.loads(path.read_text())
    change(encoded)
    path.write_text(json.dumps(encoded))


@pytest.mark.parametrize("case", list(FOLDERS))
def test_folder(predictor: MoEPredictor, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    predictor.serialize(folder)
    damage, parts = FOLDERS[case]
    damage(folder)
    with pytest.raises(ValueError, match=r".") as error:
        type(predictor).deserialize(folder)
    check_message(error, [str(folder), *parts])


def test_folder_of_another_network(make_estimator: Factory, tmp_path: Path) -> None:
    for name, head in (("this", "student_t"), ("that", "normal")):
        estimator = make_estimator(distr_output=head)
        (tmp_path / name).mkdir()
        module = estimator.create_lightning_module()
        estimator.create_predictor(None, module).serialize(tmp_path / name)
    weights = (tmp_path / "that" / "model.safetensors").read_bytes()
    (tmp_path / "this" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors do not fit .*instead of"):
        Predictor.deserialize(tmp_path / "this")


def test_gluonts_reader_refuses_what_it_cannot_build(
    predictor: MoEPredictor, tmp_path: Path
) -> None:
    """A folder of ours is no folder of GluonTS's own predictor."""
    predictor.serialize(tmp_path)
    with pytest.raises((ValueError, AssertionError, FileNotFoundError)):
        PyTorchPredictor.deserialize(tmp_path)


# Each of these would run a command, unpickle a file, or import a module.
CALLS = {
    "command": ("os.system", ["touch {marker}"]),
    "command through this package": ("moecast.forecasters.estimator.os.system", ["touch {marker}"]),
    "command through gluonts": ("gluonts.core.serde._base.os.system", ["touch {marker}"]),
    "process": ("subprocess.Popen", [["touch", "{marker}"]]),
    "evaluation": ("builtins.eval", ["open('{marker}', 'w')"]),
    "open file": ("builtins.open", ["{marker}", "w"]),
    "pickle through pandas": ("pandas.read_pickle", ["{pickle}"]),
    "pickle through torch": ("torch.load", ["{pickle}", None, None]),
    "pickle through numpy": ("numpy.load", ["{pickle}", None, True]),
    "file through numpy": ("numpy.savetxt", ["{marker}", [1.0]]),
    "file through pathlib": ("pathlib.Path.touch", [{"__kind__": "path"}]),
    "module": ("planted.Thing", []),
}


@pytest.mark.parametrize("gluonts_checks", [True, False])
@pytest.mark.parametrize("case", list(CALLS))
def test_folder_runs_nothing(
    trained_predictor: Callable[[str], MoEPredictor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    gluonts_checks: bool,
) -> None:
    """Also with a GluonTS before 0.17, which builds whatever a file names."""
    if not gluonts_checks:
        anything = "gluonts.core.serde._base._is_decode_safe"
        monkeypatch.setattr(anything, lambda cls, name: True, raising=False)
    predictor = trained_predictor("mole rmlp")
    folder, marker, pickled = tmp_path / "model", tmp_path / "marker", tmp_path / "pickle"
    folder.mkdir()
    predictor.serialize(folder)
    # Unpickling this makes the marker; so does importing the module.
    pickled.write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    (tmp_path / "planted.py").write_text(f"open({str(marker)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    name, arguments = CALLS[case]

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(marker=marker, pickle=pickled)
        if isinstance(value, list):
            return [filled(part) for part in value]
        if isinstance(value, dict):
            return {"__kind__": "instance", "class": "pathlib.PosixPath", "args": [str(marker)]}
        return value

    call = {"__kind__": "instance", "class": name, "args": filled(arguments), "kwargs": {}}
    _edit(folder, lambda encoded: encoded["kwargs"].update(calibration=call))
    with pytest.raises(ValueError, match=str(folder)):
        Predictor.deserialize(folder)
    assert not marker.exists()
