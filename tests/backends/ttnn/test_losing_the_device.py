"""What happens when the device goes away."""

from __future__ import annotations

import pytest
import torch
from model_cases import mole, series, untrained
from moecast.backends import DeviceError
from moecast.backends.ttnn import TtnnBackend, find_device
from ttnn_cases import layer

pytestmark = pytest.mark.ttnn

MODEL = mole(num_experts=4, expert="rmlp", context_length=48)


def test_a_prediction_without_its_device_names_it_and_torch_goes_on() -> None:
    from moecast.backends.ttnn.device import the_device

    predictor = untrained(MODEL(backend="ttnn"))
    dataset = series(number=12)
    forecasts = predictor.predict(dataset)
    next(forecasts)
    device = find_device()
    assert device is not None
    lost = the_device()
    lost._ttnn.close_device(lost.handle)
    with pytest.raises(DeviceError, match="Tenstorrent device") as caught:
        list(forecasts)
    assert device.name in str(caught.value)
    assert "to_backend('torch')" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not lost.is_open
    assert len(list(predictor.to_backend("torch").predict(dataset))) == len(dataset)


def test_an_error_of_the_library_is_one_sentence() -> None:
    from moecast.backends.ttnn.device import the_device

    with torch.no_grad():
        TtnnBackend().routed_ffn(*layer("linear"))  # Opens the device, also if it was lost.
    device = the_device()
    with (
        pytest.raises(DeviceError, match="broke down") as caught,
        device.errors_named("broke down"),
    ):
        device._ttnn.matmul(
            device.constant(1.0, (32, 32)),
            device.constant(1.0, (64, 32)),
        )
    assert device.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not device.is_open


def test_a_device_that_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ttnn
    from moecast.backends.ttnn import device

    def busy(**_: object) -> None:
        raise RuntimeError("TT_THROW @ cluster.cpp:1\ninfo:\nheld by process 1\nbacktrace:\n ---")

    if device._device is not None:
        device._device.close()
    monkeypatch.setattr(ttnn, "open_device", busy)
    with pytest.raises(DeviceError, match=r"could not be opened \(held by process 1\)"):
        device.the_device()
