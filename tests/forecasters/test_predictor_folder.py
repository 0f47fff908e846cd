"""A predictor written to a folder and read again, here and in a new process."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from gluonts.model.predictor import Predictor
from model_cases import HEADS, LEVELS, MODELS, Factory, forecast_values, series, untrained
from moecast.forecasters import Calibration, MoEPredictor

# Reads every folder below the first argument as GluonTS does; knows nothing of this package.
READER = """
import pickle, sys
from pathlib import Path
import numpy as np
import torch
from gluonts.model.predictor import Predictor

root, levels = Path(sys.argv[1]), [float(level) for level in sys.argv[2:]]
values = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    predictor = Predictor.deserialize(folder)
    dataset = pickle.loads((folder / "dataset.pickle").read_bytes())
    torch.manual_seed(0)
    values[folder.name] = np.stack(
        [
            np.stack([forecast.mean, *(forecast.quantile(level) for level in levels)])
            for forecast in predictor.predict(dataset)
        ]
    )
    again = folder / "again"
    again.mkdir()
    predictor.serialize(again)
(root / "values.pickle").write_bytes(pickle.dumps(values))
"""

# What MOIRAI-MoE has beyond the tiny models: the published head and scaling, no frequency,
# another decoding, and a number of samples of its own.
AS_PUBLISHED = {
    "freq": None,
    "distr_output": "moirai_mixture",
    "scaling": "regularised_std",
    "covariates_ahead": False,
}
MORE = {
    "moirai-moe as published": lambda: MODELS["moirai-moe"](**AS_PUBLISHED),
    "moirai-moe paths as published": lambda: MODELS["moirai-moe paths"](
        **AS_PUBLISHED, patch_size=[2, 3], decoding="reencode", num_samples=7, lead_time=1
    ),
}

# Implicit quantiles, which draw their levels, are compared in this process only.
ELSEWHERE = {
    **{f"model {name}": lambda name=name: (MODELS[name](), "real") for name in MODELS},
    **{f"model {name}": lambda name=name: (MORE[name](), "real") for name in MORE},
    **{
        f"head {name}": lambda name=name: (
            next(iter(MODELS.values()))(distr_output=HEADS[name][0]),
            HEADS[name][1],
        )
        for name in HEADS
        if name != "implicit_quantile"
    },
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """For each case: the predictor, what it forecast here and there, and what there wrote."""
    root = tmp_path_factory.mktemp("models")
    cases = {}
    for name, make in ELSEWHERE.items():
        estimator, kind = make()
        predictor = untrained(estimator)
        folder = root / name
        folder.mkdir()
        predictor.serialize(folder)
        (folder / "dataset.pickle").write_bytes(pickle.dumps(series(kind)))
        cases[name] = {
            "predictor": predictor,
            "here": forecast_values(predictor, series(kind)),
            "again": folder / "again",
        }
    subprocess.run(
        [sys.executable, "-c", READER, str(root), *map(str, LEVELS)],
        check=True,
        cwd=root,
        timeout=120,
    )
    there = pickle.loads((root / "values.pickle").read_bytes())
    for name, case in cases.items():
        case["there"] = there[name]
    return cases


@pytest.mark.parametrize("case", list(ELSEWHERE))
def test_new_process_forecasts_the_same(elsewhere: dict[str, dict], case: str) -> None:
    found = elsewhere[case]
    # Another process may take another number of threads and so another order of summation.
    np.testing.assert_allclose(found["there"], found["here"], rtol=1e-4, atol=1e-4)
    assert Predictor.deserialize(found["again"]) == found["predictor"]


def test_reloaded_predictor_is_equal(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.serialize(tmp_path)
    copy = Predictor.deserialize(tmp_path)
    assert type(copy) is type(predictor)
    assert copy == predictor
    assert not copy.network.training
    np.testing.assert_array_equal(
        forecast_values(copy, series()), forecast_values(predictor, series())
    )


def test_predictors_with_other_weights_are_unequal(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.serialize(tmp_path)
    for name in predictor.network.state_dict():
        copy = type(predictor).deserialize(tmp_path)
        weight = copy.network.state_dict()[name]
        weight[(0,) * weight.dim()] += 1e-3
        assert copy != predictor, name


def test_predictors_with_another_number_of_samples_are_unequal(
    predictor: MoEPredictor, tmp_path: Path
) -> None:
    predictor.serialize(tmp_path)
    assert Predictor.deserialize(tmp_path).num_samples == predictor.num_samples
    for difference in (0, 1):
        other = type(predictor)(
            predictor.network, predictor.batch_size, num_samples=predictor.num_samples + difference
        )
        assert (other == predictor) is (difference == 0)


def test_predictors_with_other_settings_are_unequal(make_estimator: Factory) -> None:
    this = untrained(make_estimator(distr_output="normal"))
    assert this == untrained(make_estimator(distr_output="normal"))
    assert this != untrained(make_estimator(distr_output="laplace"))
    calibrated = untrained(make_estimator(distr_output="normal"))
    calibrated.calibration = Calibration([0.5], [0.7])
    assert this != calibrated


def test_folder_of_strings_can_be_written_twice(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.serialize(str(tmp_path))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Predictor.deserialize(tmp_path).serialize(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_folder_names_no_device(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.to("cpu").serialize(tmp_path)
    copy = type(predictor).deserialize(tmp_path, device="cpu")
    copy.serialize(tmp_path)
    assert {tensor.device.type for tensor in copy.network.state_dict().values()} == {"cpu"}
    assert torch.device(copy.device) == torch.device("cpu")
    for path in tmp_path.iterdir():
        for name in (b"cuda", b'"cpu', b"mps"):
            assert name not in path.read_bytes(), path
    assert copy == predictor


def test_folder_holds_no_pickle(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.serialize(tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
            continue
        with pytest.raises(pickle.UnpicklingError), path.open("rb") as file:
            pickle.load(file)
        assert path.suffix == ".safetensors"


def test_class_and_base_class_read_the_same_folder(predictor: MoEPredictor, tmp_path: Path) -> None:
    predictor.serialize(tmp_path)
    readers: list[Callable] = [Predictor.deserialize, type(predictor).deserialize]
    this, that = (read(tmp_path) for read in readers)
    assert this == that


def test_predictor_can_be_pickled(predictor: MoEPredictor) -> None:
    copy = pickle.loads(pickle.dumps(predictor))
    assert copy == predictor
    np.testing.assert_array_equal(
        forecast_values(copy, series()), forecast_values(predictor, series())
    )


def test_forecast_can_be_pickled(predictor: MoEPredictor) -> None:
    forecasts = list(predictor.predict(series()))
    for forecast in forecasts:
        copy = pickle.loads(pickle.dumps(forecast))
        assert copy.start_date == forecast.start_date
        assert copy.item_id == forecast.item_id
        for level in LEVELS:
            np.testing.assert_allclose(copy.quantile(level), forecast.quantile(level), rtol=1e-6)
