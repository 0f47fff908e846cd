"""Whole models on the device against torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_cases import Factory, autoformer, moirai_moe, mole, untrained
from moecast.backends.ttnn.counting import counted
from moecast.forecasters import MoEPredictor
from ttnn_cases import IS_MOCK, correlation, needs_numbers, needs_two_queues, relative_error

pytestmark = pytest.mark.ttnn

CONTEXT, HORIZON = 48, 4
WIDE = {"d_model": 32, "d_ff": 32, "num_experts": 4, "context_length": CONTEXT}
MODELS: dict[str, Factory] = {
    "MoLE dlinear top-2": mole(
        num_experts=4, expert="dlinear", top_k=2, moving_average=5, context_length=CONTEXT
    ),
    "MoLE rmlp": mole(num_experts=4, expert="rmlp", context_length=CONTEXT),
    "MOIRAI-MoE 2 layers": moirai_moe(**WIDE, patch_size=4),
    "Autoformer 2 layers": autoformer(**WIDE, top_k=2),
}
# The real series, where they lie beside the checkout or the variable says.
DATA = Path(
    os.environ.get("TTNN_TEST_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data"
)


def inputs_of(predictor: MoEPredictor, batch: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    specs = predictor.network.describe_inputs(batch).items()
    inputs = {name: torch.randn(spec.shape, generator=generator) for name, spec in specs}
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    return inputs


@pytest.mark.parametrize("name", MODELS)
def test_forecast_parameters_are_those_of_torch(name: str) -> None:
    predictor = untrained(MODELS[name](backend="torch"))
    inputs, network = inputs_of(predictor), predictor.network
    with torch.inference_mode():
        expected = network.outputs(inputs)
        predictor.to_backend("ttnn")
        found = network.outputs(inputs)
        with counted() as counts:
            network.outputs(inputs)
    # One round trip for MoLE as for each layer with experts.
    assert counts.uploads == counts.downloads == len(expected.routings)
    assert counts.programs > counts.uploads
    for mine, theirs in zip(found.distr_args, expected.distr_args):
        assert mine.shape == theirs.shape
    assert found.routings.keys() == expected.routings.keys()
    if IS_MOCK:
        return
    for i, (mine, theirs) in enumerate(zip(found.distr_args, expected.distr_args)):
        pcc, off = correlation(mine, theirs), relative_error(mine, theirs)
        print(f"\n{name}, parameter {i}: PCC {pcc:.6f}, relative error {off:.4f}")
        assert pcc >= 0.99
        assert off <= 0.02
    for mine, theirs in zip(found.routings.values(), expected.routings.values()):
        assert correlation(mine.dense_weights(), theirs.dense_weights()) >= 0.99
        assert torch.equal(mine.ids_TK.sort().values, theirs.ids_TK.sort().values)


@pytest.mark.parametrize(
    ("name", "batch"), [("MoLE dlinear top-2", 70), ("MOIRAI-MoE 2 layers", 6)]
)
def test_forecast_parameters_are_the_same_in_pieces(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moecast.backends.ttnn import device

    needs_two_queues()
    predictor = untrained(MODELS[name](backend="ttnn"))
    inputs = inputs_of(predictor, batch)
    with torch.inference_mode():
        whole = predictor.network.outputs(inputs).distr_args
        monkeypatch.setattr(device, "PIECE_ROWS", 32)
        for _ in range(2):
            found = predictor.network.outputs(inputs).distr_args
            for mine, theirs in zip(found, whole):
                assert torch.equal(mine, theirs)
    assert device.the_device().num_traces == (1 if name.startswith("MoLE") else 2)


def test_paths_of_several_patches_are_drawn() -> None:
    predictor = untrained(moirai_moe(**WIDE, patch_size=2, num_samples=4)(backend="ttnn"))
    entry = {"start": pd.Period("2024-01-01", freq="h"), "target": np.sin(np.arange(96.0))}
    (forecast,) = predictor.predict([entry])
    assert forecast.samples.shape == (4, HORIZON)
    if not IS_MOCK:
        assert np.isfinite(forecast.samples).all()


def real_series() -> list[dict[str, Any]]:
    frame = pd.read_csv(DATA / "ETTh1.csv")
    start = pd.Period(str(frame.iloc[0, 0]), freq="h")
    return [
        {"start": start, "target": frame[column].to_numpy(np.float32)[:2000], "item_id": column}
        for column in frame.columns[1:]
    ]


def crps(predictor: MoEPredictor, series: list[dict[str, Any]]) -> float:
    """The mean over quantile levels of the pinball loss, over the sum of what was observed."""
    levels = np.arange(1, 10) / 10
    past = [{**entry, "target": entry["target"][:-HORIZON]} for entry in series]
    loss = total = 0.0
    for entry, forecast in zip(series, predictor.predict(past)):
        truth = entry["target"][-HORIZON:]
        for level in levels:
            error = truth - forecast.quantile(level)
            loss += 2 * np.maximum(level * error, (level - 1) * error).sum() / len(levels)
        total += np.abs(truth).sum()
    return float(loss / total)


@pytest.mark.parametrize("name", MODELS)
def test_crps_on_real_series_is_that_of_torch(name: str) -> None:
    needs_numbers()
    if not (DATA / "ETTh1.csv").is_file():
        pytest.skip("ETTh1.csv lies neither beside the checkout nor in TTNN_TEST_DATA")
    predictor = untrained(MODELS[name](backend="torch"))
    series = real_series()
    expected = crps(predictor, series)
    found = crps(predictor.to_backend("ttnn"), series)
    print(f"\n{name}: CRPS {found:.5f} on the device, {expected:.5f} with torch")
    assert found == pytest.approx(expected, rel=0.01)
    assert crps(predictor.to_backend("torch"), series) == expected
