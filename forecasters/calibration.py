"""Conformal calibration of quantile levels on held-out windows."""

from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from gluonts.model.predictor import Predictor
from torch.distributions import Distribution

from .fields import TARGET, WindowConfig
from .windows import held_out_steps

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
    def fit(cls, transforms: Sequence[np.ndarray], num_knots: int = 39) -> "Calibration":
        """Fit on probability integral transforms of held-out values.

        Values of the same time share its surprises, so windows rather than values are the sample:
        an interval is taken to cover the mean over windows of the share it covers, less one
        standard error of that mean.

        Parameters
        ----------
        transforms
            For each held-out window of time, over all series, the predictive cdf at its values
            ``[value]``.
        num_knots
            Coverages between which the map is linear.
        """
        nominal = np.linspace(0.0, 1.0, num_knots + 2)[1:-1]
        scores = [np.sort(np.abs(2.0 * np.asarray(t, dtype=np.float64) - 1.0)) for t in transforms]
        reached = np.unique(np.concatenate(scores))
        # One more than the number of values: split conformal prediction's correction for few.
        shares = np.stack([np.searchsorted(s, reached, "right") / (len(s) + 1) for s in scores])
        covered = shares.mean(axis=0)
        if len(shares) > 1:
            covered = covered - shares.std(axis=0, ddof=1) / np.sqrt(len(shares))
        first = np.searchsorted(np.maximum.accumulate(covered), nominal)
        model = reached[np.minimum(first, len(reached) - 1)]
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
) -> Iterator[Tuple[Dict[str, Any], np.ndarray, int]]:
    """The windows that training with ``calibration_windows`` stayed clear of.

    Yields
    ------
    entry, label, window
        An entry that ends before the window, the window's target ``[horizon]`` or
        ``[horizon, channel]``, and which window it is, counted from the end of the series.
    """
    for entry in dataset:
        target = np.asarray(entry[TARGET], dtype=np.float32)
        length = target.shape[-1]
        held_out = int(held_out_steps(np.array(length), config, windows))
        for begin in range(length - held_out, length, config.prediction_length):
            end = begin + config.prediction_length
            history = target[..., : begin - config.lead_time]
            if np.isfinite(history).any() and np.isfinite(target[..., begin:end]).any():
                window = (length - end) // config.prediction_length
                yield {**entry, TARGET: history}, target[..., begin:end].T, window


def calibrate(
    predictor: Predictor, held_out: Iterable[Tuple[Mapping[str, Any], np.ndarray, int]]
) -> Calibration:
    """Calibrate on windows that the predictor's training stayed clear of."""
    entries, labels, windows = zip(*held_out)
    by_window: Dict[int, List[np.ndarray]] = {}
    for forecast, label, window in zip(predictor.predict(entries), labels, windows):
        transform = probability_transform(forecast.distribution, label)
        by_window.setdefault(window, []).append(transform)
    return Calibration.fit([np.concatenate(parts) for parts in by_window.values()])


def probability_transform(distribution: Distribution, label: np.ndarray) -> np.ndarray:
    """Predictive cdf at the observed values of a label ``[value]``.

    Within the jumps of a discrete distribution it is drawn uniformly (Czado et al. 2009), so
    that a right distribution gives uniform values.
    """
    observed = np.isfinite(label)
    values = torch.from_numpy(np.where(observed, label, 0.0).astype(np.float32))
    transform = distribution.cdf(values)
    if distribution.support is not None and distribution.support.is_discrete:
        below = distribution.cdf((values - 1).clamp_min(0))
        below = torch.where(values >= 1, below, torch.zeros_like(below))
        transform = below + torch.rand_like(below) * (transform - below)
    return transform.numpy()[observed]
