"""Forecasters with known output, found by class path in the tests of the command line."""

from __future__ import annotations

from typing import Iterable, Iterator, Optional

import numpy as np
from gluonts.dataset.util import forecast_start
from gluonts.model import Estimator, Forecast, Predictor
from gluonts.model.forecast import QuantileForecast

LEVELS = [0.025, *(round(0.1 * i, 1) for i in range(1, 10)), 0.975]


class BandPredictor(Predictor):
    """Forecasts `level` with quantile q at level + width · (q − ½), as many channels as seen."""

    def __init__(self, prediction_length: int, level: float = 0.0, width: float = 1.0) -> None:
        super().__init__(prediction_length)
        self.level, self.width = level, width

    def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
        for entry in dataset:
            channels = entry["target"].shape[:-1]
            ones = np.ones((self.prediction_length, *channels))
            arrays = [self.level + self.width * (q - 0.5) for q in LEVELS]
            yield QuantileForecast(
                forecast_arrays=np.stack([*(ones * a for a in arrays), ones * self.level]),
                forecast_keys=[*map(str, LEVELS), "mean"],
                start_date=forecast_start(entry),
                item_id=entry.get("item_id"),
            )


class RecordingEstimator(Estimator):
    """Remembers what it was trained on; predicts a band around the mean of all training values."""

    def __init__(self, prediction_length: int, freq: str = "", width: float = 1.0) -> None:
        super().__init__()
        if width < 0:
            raise ValueError(f"width={width} must not be negative")
        self.prediction_length, self.freq, self.width = prediction_length, freq, width
        self.training: list[dict] = []
        self.validation: Optional[list[dict]] = None

    def train(
        self, training_data: Iterable[dict], validation_data: Optional[Iterable[dict]] = None
    ) -> Predictor:
        self.training = list(training_data)
        self.validation = None if validation_data is None else list(validation_data)
        level = np.mean(np.concatenate([e["target"].ravel() for e in self.training]))
        return BandPredictor(self.prediction_length, float(level), self.width)


class SilentPredictor(Predictor):
    """Gives no forecast at all."""

    def predict(self, dataset: Iterable[dict], **kwargs: object) -> Iterator[Forecast]:
        return iter(())
