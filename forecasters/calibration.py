"""Conformal calibration of quantile levels on held-out windows."""

from typing import Any, Dict, Iterable, Iterator, List, Mapping, Tuple

import numpy as np
import torch
from gluonts.model.predictor import Predictor
from torch.distributions import Distribution

from ..distributions import probability_transform
from .fields import TARGET, WindowConfig
from .series import held_out_steps

_LARGEST_COVERAGE = 0.998


class Calibration:
    """Reads a quantile at the level that held-out windows say it belongs to.

    Split conformal prediction with the distance of the probability integral transform from the
    median as score (Chernozhukov et al. 2021): the central interval that covered a share c of the
    held-out values becomes the interval of nominal coverage c. The median stays where it is, and
    quantiles stay in order and within the head's support, because only levels change.

    Parameters
    ----------
    nominal, model
        Central coverages, ascending: what is asked for, and the model's own that delivers it.
    """

    def __init__(self, nominal: List[float], model: List[float]) -> None:
        self.nominal = list(nominal)
        self.model = list(model)

    def __getnewargs_ex__(self) -> Tuple[Tuple[()], Dict[str, Any]]:
        return (), {"nominal": self.nominal, "model": self.model}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Calibration)
            and self.nominal == other.nominal
            and self.model == other.model
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def fit(cls, transforms: np.ndarray, num_knots: int = 39) -> "Calibration":
        """Fit on probability integral transforms of held-out values.

        Parameters
        ----------
        transforms
            ``[value]``: the predictive cdf at each held-out value.
        num_knots
            Coverages between which the map is linear.
        """
        scores = np.sort(np.abs(2.0 * np.asarray(transforms, dtype=np.float64) - 1.0))
        nominal = np.linspace(0.0, 1.0, num_knots + 2)[1:-1]
        # The rank that covers one more value with this probability (Vovk et al. 2005).
        ranks = np.ceil((len(scores) + 1) * nominal - 1e-9).astype(int)
        model = scores[np.minimum(ranks, len(scores)) - 1]
        return cls(nominal.tolist(), np.minimum(model, _LARGEST_COVERAGE).tolist())

    def of(self, levels: np.ndarray) -> np.ndarray:
        """The model's levels for nominal levels in (0, 1), any shape."""
        centred = 2.0 * np.asarray(levels, dtype=np.float64) - 1.0
        coverage = np.interp(np.abs(centred), [0.0, *self.nominal, 1.0], [0.0, *self.model, 1.0])
        return 0.5 + 0.5 * np.sign(centred) * coverage

    def __call__(self, level: float) -> float:
        return float(self.of(np.array(level)))


def held_out_windows(
    dataset: Iterable[Mapping[str, Any]], config: WindowConfig, windows: int
) -> Iterator[Tuple[Dict[str, Any], np.ndarray]]:
    """The windows that training with ``calibration_windows`` stayed clear of.

    Yields
    ------
    entry, label
        An entry that ends before the window, and the window's target ``[horizon]`` or
        ``[horizon, channel]``.
    """
    for entry in dataset:
        target = np.asarray(entry[TARGET], dtype=np.float32)
        length = target.shape[-1]
        held_out = int(held_out_steps(np.array(length), config, windows))
        for begin in range(length - held_out, length, config.prediction_length):
            end = begin + config.prediction_length
            history = target[..., : begin - config.lead_time]
            if np.isfinite(history).any() and np.isfinite(target[..., begin:end]).any():
                yield {**entry, TARGET: history}, target[..., begin:end].T


def calibrate(
    predictor: Predictor, held_out: Iterable[Tuple[Mapping[str, Any], np.ndarray]]
) -> Calibration:
    """Calibrate on windows that the predictor's training stayed clear of."""
    entries, labels = zip(*held_out)
    transforms = [
        transform_label(forecast.distribution, label)
        for forecast, label in zip(predictor.predict(entries), labels)
    ]
    return Calibration.fit(np.concatenate(transforms))


def transform_label(distribution: Distribution, label: np.ndarray) -> np.ndarray:
    """Probability integral transforms of the observed values of a label ``[value]``."""
    observed = np.isfinite(label)
    values = torch.from_numpy(np.where(observed, label, 0.0).astype(np.float32))
    return probability_transform(distribution, values).numpy()[observed]
