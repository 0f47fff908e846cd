"""Data of the long-horizon papers: standard splits, standardised values, every test window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional, Sequence, Union

import numpy as np
import pandas as pd
from gluonts.dataset.split import OffsetSplitter, TestData

from .datasets import Entry, series_entries
from .errors import EvaluationError
from .tables import Irregular, PathLike, read_regular_csv

_ETT_MONTHS = (12, 4, 4)
_DAYS_PER_MONTH = 30
_TRAIN_SHARE, _TEST_SHARE = 0.7, 0.2


class Borders(NamedTuple):
    """Rows at which the training, validation and test part end (exclusive)."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True, eq=False)
class StandardScaler:
    """Standardisation per channel.

    Parameters
    ----------
    mean, scale
        float64 [D]; a scale is positive.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> StandardScaler:
        """Mean and population standard deviation of `values` [T, D], missing values left out.

        A constant channel has scale 1, an entirely missing one mean 0 and scale 1.
        """
        observed = np.ma.masked_invalid(values)
        mean = np.ma.filled(observed.mean(axis=0), 0.0)
        scale = np.ma.filled(observed.std(axis=0), 0.0)
        return cls(mean, np.where(scale > 0, scale, 1.0))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Standardise `values` [..., D]."""
        return (values - self.mean) / self.scale

    def inverse_transform(self, values: np.ndarray) -> np.ndarray:
        """Bring standardised `values` [..., D] back to their units."""
        return values * self.scale + self.mean


@dataclass(frozen=True, eq=False)
class LongHorizonDataset:
    """A multivariate series with the splits under which long-horizon papers report.

    Parameters
    ----------
    name
        Name of the data set.
    start
        Period of the first row.
    columns
        Names of the channels [D].
    values
        The rows in their units, float64 [T, D], NaN where missing.
    borders
        Ends of the three parts.
    scaler
        Standardisation fitted on the training part.
    """

    name: str
    start: pd.Period
    columns: tuple[str, ...]
    values: np.ndarray
    borders: Borders
    scaler: StandardScaler

    def __post_init__(self) -> None:
        train, validation, test = self.borders
        if not 0 < train <= validation < test <= len(self.values):
            raise EvaluationError(
                f"{self.name}: parts that end at rows {train}, {validation} and {test} do not fit "
                f"{len(self.values)} rows; choose another split."
            )

    @property
    def freq(self) -> str:
        """pandas frequency of the rows."""
        return self.start.freqstr

    @property
    def num_channels(self) -> int:
        """Number of channels D."""
        return len(self.columns)

    def entries(
        self, start: int = 0, stop: Optional[int] = None, *, multivariate: bool = False
    ) -> list[Entry]:
        """Standardised rows from `start` to `stop` (exclusive) as GluonTS entries.

        Returns
        -------
        list of dict
            D entries with targets float32 [stop − start], or one with a target [D, stop − start].
        """
        return series_entries(
            self.start + start,
            self.columns,
            self.scaler.transform(self.values[start:stop]),
            name=self.name if multivariate else None,
        )

    def training_entries(self, *, multivariate: bool = False) -> list[Entry]:
        """The standardised training part."""
        return self.entries(stop=self.borders.train, multivariate=multivariate)

    def validation_entries(
        self, context_length: Optional[int] = None, *, multivariate: bool = False
    ) -> list[Entry]:
        """The standardised validation part with its history before it.

        Parameters
        ----------
        context_length
            Number of training rows at its beginning, so that the first validation forecast has its
            context; all of them by default.
        multivariate
            Give one entry [D, T] instead of D entries.
        """
        reach = self.borders.train if context_length is None else context_length
        first = max(self.borders.train - reach, 0)
        return self.entries(first, self.borders.validation, multivariate=multivariate)

    def num_windows(self, prediction_length: int, stride: int = 1) -> int:
        """Number of test windows per channel.

        Raises
        ------
        EvaluationError
            The test part is shorter than one horizon.
        """
        if prediction_length < 1 or stride < 1:
            raise EvaluationError(
                f"prediction_length={prediction_length} and stride={stride} must be at least 1."
            )
        rows = self.borders.test - self.borders.validation
        if rows < prediction_length:
            raise EvaluationError(
                f"{self.name}: the test part has {rows} rows, fewer than prediction_length="
                f"{prediction_length}; choose a shorter horizon."
            )
        return (rows - prediction_length) // stride + 1

    def test_windows(
        self,
        prediction_length: int,
        context_length: Optional[int] = None,
        *,
        multivariate: bool = False,
        stride: int = 1,
    ) -> TestData:
        """Every window of the test part, standardised.

        The first forecast begins with the test part's first row, its context reaching back into
        the validation part; the last one ends with the test part's last row (for stride 1).

        Parameters
        ----------
        prediction_length
            Horizon H.
        context_length
            Number of rows before each forecast that a forecaster may see, as in the papers; all
            rows from the first one by default.
        multivariate
            One series with targets [D, T] instead of D series.
        stride
            Rows between the starts of two windows.

        Returns
        -------
        TestData
            Pairs of input and label, all windows of one series before those of the next.

        Raises
        ------
        EvaluationError
            The test part is shorter than one horizon, or the context longer than what precedes it.
        """
        windows = self.num_windows(prediction_length, stride)
        first = self.borders.validation
        if context_length is not None and not 0 < context_length <= first:
            raise EvaluationError(
                f"{self.name}: context_length={context_length} must be between 1 and the {first} "
                "rows before the test part."
            )
        return TestData(
            self.entries(stop=self.borders.test, multivariate=multivariate),
            OffsetSplitter(first),
            prediction_length,
            windows,
            stride,
            context_length,
        )


def load_long_horizon(
    path: PathLike,
    *,
    split: Union[Literal["auto", "ett", "ratio"], tuple[int, int, int]] = "auto",
    name: Optional[str] = None,
    timestamp: str = "date",
    columns: Optional[Sequence[str]] = None,
    freq: Optional[str] = None,
    missing_values: Sequence[float] = (-9999.0,),
    irregular: Irregular = "reindex",
) -> LongHorizonDataset:
    """Load a data set of the long-horizon papers (ETT, Weather, Electricity, …).

    Parameters
    ----------
    path
        CSV file with a timestamp column and one column per channel.
    split
        `"ett"`: 12, 4 and 4 months of 30 days from the first row (Zhou et al., Informer, AAAI
        2021); `"ratio"`: the first 70 %, the next 10 % and the last 20 % of the rows (Wu et al.,
        Autoformer, NeurIPS 2021); `"auto"`: `"ett"` for files whose name begins with ETT; or the
        numbers of rows of the three parts.
    name
        Name of the data set, by default the file's.
    timestamp, columns, freq, missing_values, irregular
        As in `load_wide`. The papers' numbers for Weather take −9999 as a measurement and the rows
        as evenly spaced: `missing_values=(), irregular="keep"`.

    Raises
    ------
    EvaluationError
        The file, a column, a value or the time grid is unusable, or the split does not fit.
    """
    name = Path(path).stem if name is None else name
    table = read_regular_csv(
        path,
        timestamp=timestamp,
        columns=columns,
        freq=freq,
        missing_values=missing_values,
        irregular=irregular,
    )
    if split == "auto":
        split = "ett" if name.upper().startswith("ETT") else "ratio"
    rows = len(table.values)
    if split == "ett":
        borders = _ett_borders(table.start)
        if borders.test > rows:
            raise EvaluationError(
                f"{name}: 12, 4 and 4 months are {borders.test} rows of freq="
                f"{table.start.freqstr!r}, but there are {rows}; use split='ratio'."
            )
    elif split == "ratio":
        train, test = int(rows * _TRAIN_SHARE), int(rows * _TEST_SHARE)
        borders = Borders(train, rows - test, rows)
    elif isinstance(split, tuple):
        borders = Borders(*np.cumsum(split).tolist())
    else:
        raise EvaluationError(
            f"split={split!r} is unknown; choose 'auto', 'ett', 'ratio' or three numbers of rows."
        )
    scaler = StandardScaler.fit(table.values[: borders.train])
    return LongHorizonDataset(name, table.start, table.columns, table.values, borders, scaler)


def _ett_borders(start: pd.Period) -> Borders:
    step = (start + 1).start_time - start.start_time
    rows_per_month = _DAYS_PER_MONTH * (pd.Timedelta(days=1) // step)
    return Borders(*(np.cumsum(_ETT_MONTHS) * rows_per_month).tolist())
