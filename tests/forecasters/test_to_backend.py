"""Who computes a predictor's routers and experts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from model_cases import Factory, autoformer, forecast_values, moirai_moe, mole, series, untrained
from moecast.backends import BackendUnavailableError, TorchBackend
from moecast.backends.ttnn import what_is_missing

MODELS: dict[str, Factory] = {
    "mole": mole(),
    "moirai-moe": moirai_moe(),
    "autoformer": autoformer(num_experts=3, top_k=2),
}
without_device = pytest.mark.skipif(
    what_is_missing() is None, reason="this machine has a Tenstorrent device"
)


class CountingBackend(TorchBackend):
    """Torch, which counts what is asked of it."""

    folds = True

    def __init__(self) -> None:
        self.calls = 0

    def routed_ffn(self, *arguments):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().routed_ffn(*arguments)

    def linear_mixture(self, *arguments):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().linear_mixture(*arguments)


@pytest.mark.parametrize("name", MODELS)
def test_each_router_with_its_experts_is_one_call(name: str) -> None:
    predictor = untrained(MODELS[name](backend="torch"))
    expected = forecast_values(predictor, series())
    backend = CountingBackend()
    predictor.network.use_backend(backend)
    np.testing.assert_allclose(forecast_values(predictor, series()), expected, rtol=1e-4, atol=1e-4)
    assert backend.calls == len(predictor.expert_usage.weight_share)
    assert forecast_values(predictor.to_backend("torch"), series()) == pytest.approx(expected)


@without_device
@pytest.mark.parametrize("name", MODELS)
def test_a_backend_that_cannot_be_had_is_refused_before_work_starts(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match="backend='ttnn' cannot be had: there is no"):
        MODELS[name](backend="ttnn")
    predictor = untrained(MODELS[name](backend="torch"))
    with pytest.raises(BackendUnavailableError, match="backend='ttnn' cannot be had: there is no"):
        predictor.to_backend("ttnn")
    with pytest.raises(ValueError, match="backend='abacus' is unknown"):
        predictor.to_backend("abacus")
    assert predictor.network.backend.name == "torch"


@without_device
def test_a_predictor_saved_with_a_device_forecasts_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = untrained(mole()(backend="torch"))
    predictor.serialize(tmp_path)
    saved = tmp_path / "predictor.json"
    text = saved.read_text()
    elsewhere = text.replace('"backend": "torch"', '"backend": "ttnn"')
    assert elsewhere != text
    json.loads(elsewhere)
    saved.write_text(elsewhere)
    with caplog.at_level(logging.WARNING):
        loaded = type(predictor).deserialize(tmp_path)
    (warning,) = {record.getMessage() for record in caplog.records}
    assert "backend='ttnn' cannot be had" in warning
    assert "torch" in warning
    np.testing.assert_allclose(
        forecast_values(loaded, series()), forecast_values(predictor, series()), rtol=1e-5
    )


def test_another_backend_is_not_saved(tmp_path: Path) -> None:
    predictor = untrained(mole()(backend="auto"))
    predictor.to_backend("torch").serialize(tmp_path)
    assert '"backend": "auto"' in (tmp_path / "predictor.json").read_text()
