"""What a backtest keeps of its windows beside the metrics: scores, ranks of labels, a few fans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import numpy as np
import pandas as pd
from gluonts.dataset.field_names import FieldName

from .metrics import DECILES, interval_quantiles

INTERVALS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Levels of the central intervals whose coverage is counted."""
FAN_LEVELS = (0.025, 0.1, 0.3, 0.5, 0.7, 0.9, 0.975)
"""Quantiles kept of the windows that can be drawn."""
PIT_BINS = len(DECILES) + 1

# CRPS asks for the deciles and MSIS for the tails, so that none of these costs anything more.
_LEVELS = (FAN_LEVELS[0], *DECILES, FAN_LEVELS[-1])
_DECILE_ROWS = slice(1, -1)
_MAX_FAN_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Scores of each window and sums over all of them.

    W windows in the order of the test data, S series, H steps, E experts of a router. Sums are over
    the values that were observed, of all channels.

    Parameters
    ----------
    item_ids
        Names of the series [S].
    series
        Which series each window is of [W].
    starts
        First period forecast in each window [W].
    observed
        Number of labels [W].
    quantile_loss
        Sum of the quantile loss, averaged over the deciles [W]. Divided by `absolute_label`, both
        summed over windows, it is the CRPS.
    absolute_label
        Sum of |label| [W].
    scaled_loss, scaled_error
        Sums of `quantile_loss` and of the median's absolute error in units of the seasonal error
        [W].
    scaled
        Number of labels with a seasonal error to divide by [W]; `scaled_error` divided by it, both
        summed over windows, is MASE.
    step_loss, step_observed
        `quantile_loss` and `observed` by step of the horizon instead of by window [H].
    pit
        Number of labels between neighbouring deciles, the first below the lowest [10]. A label that
        equals several deciles, as counts do, belongs to the bins around them in equal parts
        (Czado, Gneiting and Held, 2009).
    inside
        Number of labels in each of `INTERVALS`, ends included [5].
    drawable
        Windows of which `fans` are kept, evenly spread if memory does not allow all.
    fans
        Their quantiles at `FAN_LEVELS`, float32 [windows kept, 7, H] or [windows kept, 7, H, C].
    patch_sizes
        Patch size that each window was forecast with [W], None if the forecasts do not tell.
    expert_weights
        Mean share of each expert in each window [W, E], by router; empty if the forecasts do not
        tell.
    expert_share
        Mean share of each expert [E], by router, as the predictor tells.
    """

    item_ids: tuple[str, ...]
    series: np.ndarray
    starts: tuple[pd.Period, ...]
    observed: np.ndarray
    quantile_loss: np.ndarray
    absolute_label: np.ndarray
    scaled_loss: np.ndarray
    scaled_error: np.ndarray
    scaled: np.ndarray
    step_loss: np.ndarray
    step_observed: np.ndarray
    pit: np.ndarray
    inside: np.ndarray
    drawable: np.ndarray
    fans: np.ndarray
    patch_sizes: Optional[np.ndarray]
    expert_weights: Mapping[str, np.ndarray]
    expert_share: Mapping[str, np.ndarray]

    @property
    def coverage(self) -> np.ndarray:
        """Share of labels in each of `INTERVALS` [5]."""
        return self.inside / max(self.observed.sum(), 1)

    @property
    def step_crps(self) -> np.ndarray:
        """Mean quantile loss of each step in units of the mean |label| [H].

        Where no label is missing, its mean over the steps is the CRPS.
        """
        mean_label = self.absolute_label.sum() / max(self.observed.sum(), 1)
        unit = np.where(self.step_observed > 0, self.step_observed * mean_label, np.nan)
        return np.divide(self.step_loss, unit, out=np.full(len(unit), np.nan), where=unit > 0)


class DiagnosticsCollector:
    """Gathers `Diagnostics` window by window, in the same pass as the metrics.

    Parameters
    ----------
    num_windows
        Number of windows W in all.
    windows
        Number of windows of each series.
    prediction_length, num_variates
        Steps H and channels C of each.
    seasonality
        Steps per season.
    """

    def __init__(
        self,
        num_windows: int,
        windows: int,
        prediction_length: int,
        num_variates: int,
        seasonality: int,
    ) -> None:
        self._windows = windows
        self._seasonality = seasonality
        size = len(FAN_LEVELS) * prediction_length * num_variates * np.float32().nbytes
        kept = min(num_windows, max(1, _MAX_FAN_BYTES // size))
        self._drawable = np.unique(np.linspace(0, num_windows - 1, kept).round().astype(int))
        self._to_draw = set(self._drawable.tolist())
        self._fans: list[np.ndarray] = []
        self._item_ids: list[str] = []
        self._starts: list[pd.Period] = []
        self._sums: list[tuple[float, ...]] = []
        self._steps = np.zeros((2, prediction_length))
        self._pit = np.zeros(PIT_BINS)
        self._inside = np.zeros(len(INTERVALS), dtype=np.int64)
        self._patch_sizes: list[int] = []
        self._expert_weights: dict[str, list[np.ndarray]] = {}
        self._has_quantiles = True

    def add(self, past: Mapping[str, Any], label: Mapping[str, Any], forecast: Any) -> None:
        """Add the next window: what came before it, what was observed, what was forecast."""
        if not self._has_quantiles:
            return
        position = len(self._sums)
        quantiles = np.stack([np.asarray(forecast[str(level)]) for level in _LEVELS])
        if np.isnan(quantiles).any():
            # A point forecast. What else may be wrong with it is told by the metrics.
            self._has_quantiles = False
            return
        target = np.asarray(label[FieldName.TARGET], dtype=np.float64).T
        seasonal_error = self._seasonal_error(past[FieldName.TARGET])
        self._add_scores(target, quantiles.astype(np.float64), seasonal_error)
        if position in self._to_draw:
            rows = [_LEVELS.index(level) for level in FAN_LEVELS]
            self._fans.append(quantiles[rows].astype(np.float32))
        if position % self._windows == 0:
            self._item_ids.append(str(label.get(FieldName.ITEM_ID, len(self._item_ids))))
        self._starts.append(forecast.start_date)
        info = forecast.info if isinstance(forecast.info, Mapping) else {}
        if "patch_size" in info:
            self._patch_sizes.append(int(info["patch_size"]))
        for router, weights in info.get("expert_weights", {}).items():
            self._expert_weights.setdefault(router, []).append(np.asarray(weights, np.float32))

    def _seasonal_error(self, target: np.ndarray) -> np.ndarray:
        """Mean absolute seasonal difference of each channel, NaN where there is none to divide by.

        As GluonTS's: of neighbouring values where the history is shorter than a season.
        """
        target = np.atleast_2d(np.asarray(target, dtype=np.float64))
        lag = self._seasonality if self._seasonality <= target.shape[-1] else 1
        differences = np.abs(target[:, lag:] - target[:, :-lag])
        known = np.isfinite(differences)
        count = known.sum(axis=-1)
        total = np.where(known, differences, 0.0).sum(axis=-1)
        return np.divide(total, count, out=np.full(len(target), np.nan), where=total > 0)

    def _add_scores(
        self, target: np.ndarray, quantiles: np.ndarray, seasonal_error: np.ndarray
    ) -> None:
        shape = (len(target), -1)
        target_HC = target.reshape(shape)
        quantiles_LHC = quantiles.reshape(len(quantiles), *target_HC.shape)
        known = np.isfinite(target_HC)
        label = np.where(known, target_HC, 0.0)
        deciles = quantiles_LHC[_DECILE_ROWS]
        level = np.array(DECILES)[:, None, None]
        pinball = 2 * np.abs((label - deciles) * ((deciles >= label) - level))
        loss = np.where(known, pinball.mean(axis=0), 0.0)
        error = np.where(known, np.abs(label - deciles[DECILES.index(0.5)]), 0.0)
        scalable = known & np.isfinite(seasonal_error)
        scale = np.where(np.isfinite(seasonal_error), seasonal_error, 1.0)
        self._sums.append(
            (
                known.sum(),
                loss.sum(),
                np.abs(label).sum(),
                np.where(scalable, loss / scale, 0.0).sum(),
                np.where(scalable, error / scale, 0.0).sum(),
                scalable.sum(),
            )
        )
        self._steps += loss.sum(axis=1), known.sum(axis=1)
        lowest = (deciles < label).sum(axis=0)[known]
        highest = (deciles <= label).sum(axis=0)[known]
        # Quantiles that cross would put the lowest bin above the highest.
        lowest, highest = np.minimum(lowest, highest), np.maximum(lowest, highest)
        part = 1.0 / (highest - lowest + 1)
        ends = np.bincount(lowest, part, PIT_BINS + 1) - np.bincount(
            highest + 1, part, PIT_BINS + 1
        )
        self._pit += ends.cumsum()[:PIT_BINS]
        for i, interval in enumerate(INTERVALS):
            lower, upper = (quantiles_LHC[_LEVELS.index(q)] for q in interval_quantiles(interval))
            self._inside[i] += (known & (lower <= label) & (label <= upper)).sum()

    def get(self, expert_share: Optional[Mapping[str, np.ndarray]] = None) -> Optional[Diagnostics]:
        """What was gathered; None if some forecast had no quantiles.

        Parameters
        ----------
        expert_share
            What the predictor tells of all windows together.
        """
        if not self._has_quantiles or not self._sums:
            return None
        count = len(self._sums)
        sums = np.array(self._sums).T
        complete: Sequence[str] = [
            name for name, rows in self._expert_weights.items() if len(rows) == count
        ]
        return Diagnostics(
            item_ids=tuple(self._item_ids),
            series=np.arange(count) // self._windows,
            starts=tuple(self._starts),
            observed=sums[0].astype(np.int64),
            quantile_loss=sums[1],
            absolute_label=sums[2],
            scaled_loss=sums[3],
            scaled_error=sums[4],
            scaled=sums[5].astype(np.int64),
            step_loss=self._steps[0],
            step_observed=self._steps[1],
            pit=self._pit,
            inside=self._inside,
            drawable=self._drawable,
            fans=np.stack(self._fans),
            patch_sizes=np.array(self._patch_sizes) if len(self._patch_sizes) == count else None,
            expert_weights={name: np.stack(self._expert_weights[name]) for name in complete},
            expert_share=dict(expert_share or {}),
        )
