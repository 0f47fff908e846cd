"""Reading tables: CSV files, timestamps, frequencies, and rows placed on a regular time grid."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Literal, Optional, Sequence, Union

import numpy as np
import pandas as pd

from .errors import DataWarning, EvaluationError

PathLike = Union[str, Path]
Irregular = Literal["reindex", "keep", "raise"]
TimeZone = Literal["local", "utc", "raise"]

_NAMES_SHOWN = 8
_INFERENCE_RUNS = (24, 12, 6, 3)
# Two frequencies are told apart in runs of at least this many timestamps: among fewer, Tuesday to
# Thursday are days rather than business days.
_SHORTEST_MIXED_RUN = 6
_ZONE = r"(?<=\d\d:\d\d)(:\d\d)?(\.\d+)?\s?(Z|UTC|[+-]\d\d:?(?:\d\d)?)$"


def read_csv(path: PathLike, text_columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file whatever its line ends and header encoding.

    Bytes that are not UTF-8 become U+FFFD; a byte-order mark and blanks around column names are
    dropped. `text_columns` are kept as text, so that dates such as 19580329 stay dates.

    Raises
    ------
    EvaluationError
        The file is missing, empty or not a CSV table.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such file; check the path.")
    try:
        frame = pd.read_csv(
            path,
            encoding="utf-8-sig",
            encoding_errors="replace",
            skipinitialspace=True,
            dtype=dict.fromkeys(text_columns, "str"),
            low_memory=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise EvaluationError(f"{path}: not a CSV table ({error}).") from error
    frame.columns = frame.columns.astype(str).str.strip()
    return frame


def require_columns(frame: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    """Raise an `EvaluationError` naming the first of `columns` that `frame` lacks."""
    for column in columns:
        if column not in frame.columns:
            raise EvaluationError(
                f"{where}: there is no column {column!r}; {suggestion(column, frame.columns)}."
            )


def suggestion(name: str, known: Iterable[Any]) -> str:
    """What to write instead of an unknown `name`: what is near to it, or what there is."""
    names = [str(other) for other in known]
    folded = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), folded, n=2)
    if near:
        return f"did you mean {' or '.join(repr(folded[other]) for other in near)}"
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"choose among {', '.join(map(repr, names[:_NAMES_SHOWN]))}{more}"


def numeric(column: pd.Series, where: str) -> np.ndarray:
    """`column` as float64 [rows]; blanks are NaN.

    Raises
    ------
    EvaluationError
        A value is not a number; the message quotes it and names its row.
    """
    values = pd.to_numeric(column, errors="coerce")
    bad = values.isna() & column.notna()
    if bad.any():
        raise EvaluationError(
            f"{where}: column {column.name!r} holds {column[bad].iloc[0]!r}, which is not a "
            f"number, in row {_row(column, bad)}; leave the column out or encode it as numbers."
        )
    return values.to_numpy(dtype=np.float64)


def parse_times(column: pd.Series, where: str, time_zone: TimeZone = "local") -> pd.DatetimeIndex:
    """Timestamps of `column`: ISO dates, the Monash archive's `2000-01-01 00-00-00`, or datetimes.

    Parameters
    ----------
    column
        Text or datetimes.
    where
        File or frame, for messages.
    time_zone
        What to do with the time zones of timestamps that have them: `"local"` keeps the wall time
        and warns, `"utc"` converts to UTC, `"raise"` refuses.

    Raises
    ------
    EvaluationError
        A value is missing or not a date; the message quotes it and names its row.
    """
    if time_zone not in ("local", "utc", "raise"):
        raise EvaluationError(
            f"time_zone={time_zone!r} is unknown; choose 'local', 'utc' or 'raise'."
        )
    if pd.api.types.is_datetime64_any_dtype(column):
        times = pd.DatetimeIndex(column)
        if times.tz is not None:
            _report_zone(str(column.iloc[0]), column, where, time_zone)
            times = (times.tz_convert("UTC") if time_zone == "utc" else times).tz_localize(None)
    else:
        text = column.astype("str").str.strip()
        text = text.str.replace(r"(?<=\d) (\d\d)-(\d\d)-(\d\d)$", r" \1:\2:\3", regex=True)
        wall = text.str.replace(_ZONE, r"\1\2", regex=True)
        zoned = bool((wall != text).any())
        if zoned:
            _report_zone(text[wall != text].iloc[0], column, where, time_zone)
        to_utc = zoned and time_zone == "utc"
        times = _parse_text(text if to_utc else wall, utc=to_utc)
    if times.isna().any():
        bad = pd.Series(times.isna(), index=column.index)
        raise EvaluationError(
            f"{where}: column {column.name!r} holds {column[bad].iloc[0]!r}, which is not a date, "
            f"in row {_row(column, bad)}; write dates as 2020-01-31 or 2020-01-31 00:00:00."
        )
    return times


def _parse_text(text: pd.Series, *, utc: bool) -> pd.DatetimeIndex:
    times = pd.DatetimeIndex(pd.to_datetime(text, format="ISO8601", errors="coerce", utc=utc))
    if len(times) and times.isna().all():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            times = pd.DatetimeIndex(pd.to_datetime(text, errors="coerce", utc=utc))
    return times.tz_localize(None)


def _report_zone(first: str, column: pd.Series, where: str, time_zone: TimeZone) -> None:
    found = f"{where}: column {column.name!r} has time zones (first {first!r})"
    if time_zone == "raise":
        raise EvaluationError(
            f"{found}; take the wall time with time_zone='local' or convert with time_zone='utc'."
        )
    if time_zone == "local":
        warnings.warn(
            f"{found}; the wall time is kept and the zone dropped (time_zone='local').",
            DataWarning,
            stacklevel=4,
        )


def _row(column: pd.Series, bad: pd.Series) -> int:
    """The first bad row, counted from 1 below the header."""
    return int(np.argmax(bad.to_numpy())) + 1


def period_freq(freq: str) -> str:
    """The frequency that `pandas.Period` takes for any offset alias (`"MS"` and `"ME"` are `"M"`).

    Raises
    ------
    EvaluationError
        pandas knows no such frequency.
    """
    try:
        return pd.Period("2000-01-03", freq=freq).freqstr
    except ValueError:
        pass
    try:
        return pd.date_range("2000-01-01", periods=1, freq=freq).to_period().freqstr
    except ValueError as error:
        raise EvaluationError(
            f"freq={freq!r} is no frequency that pandas knows; use one such as 'h', '15min', 'D', "
            "'W-SUN', 'M'."
        ) from error


def infer_freq(times: pd.DatetimeIndex, where: str) -> str:
    """Period frequency of `times`, which may be unsorted, repeat themselves and have gaps.

    Where the whole is irregular, the frequency that most of its short regular runs have.

    Raises
    ------
    EvaluationError
        There are fewer than three distinct times, no regular run among them, or runs of two
        frequencies.
    """
    times = times.unique().sort_values()
    if len(times) >= 3:
        freq = pd.infer_freq(times)
        if freq is not None:
            return period_freq(freq)
    for run in _INFERENCE_RUNS:
        starts = range(0, len(times) - run + 1, run)
        runs = (pd.infer_freq(times[first : first + run]) for first in starts)
        found = Counter(freq for freq in runs if freq is not None)
        if found:
            _refuse_mixture(found, run, where)
            return period_freq(found.most_common(1)[0][0])
    raise EvaluationError(
        f"{where}: no frequency can be read from {len(times)} distinct timestamps; give freq, such "
        "as freq='h'."
    )


def _refuse_mixture(found: Counter[str], run: int, where: str) -> None:
    several = [freq for freq, count in found.most_common(2) if count > 1]
    if run >= _SHORTEST_MIXED_RUN and len(several) == 2:
        raise EvaluationError(
            f"{where}: the timestamps are partly of freq={period_freq(several[0])!r} and partly of "
            f"freq={period_freq(several[1])!r}; split the data, bring it to one frequency, or give "
            "freq to leave gaps where rows are missing."
        )


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the rows of a table lie on a regular time grid.

    Parameters
    ----------
    start
        First period of the grid.
    length
        Number of periods from the first row's to the last row's, both included.
    positions
        Position of each row on the grid, in the rows' order, int64 [rows].
    moved
        Rows whose time lies elsewhere within its period than most rows' do, where periods are a
        day or shorter; bool [rows].
    """

    start: pd.Period
    length: int
    positions: np.ndarray
    moved: np.ndarray

    @classmethod
    def locate(cls, times: pd.DatetimeIndex, freq: str, where: str) -> Grid:
        """Place `times` [rows] on the grid of `freq` that their earliest one begins.

        Raises
        ------
        EvaluationError
            There are no rows, or times fall between the grid's points.
        """
        if len(times) == 0:
            raise EvaluationError(f"{where}: there are no rows; check the file or the filter.")
        periods = times.to_period(freq)
        ordinals = periods.astype("int64").to_numpy()
        start = periods[int(np.argmin(ordinals))]
        positions, remainder = np.divmod(ordinals - ordinals.min(), start.freq.n)
        if remainder.any():
            raise EvaluationError(
                f"{where}: {np.count_nonzero(remainder)} timestamps, first "
                f"{times[int(np.argmax(remainder > 0))]}, lie between the points of a grid of "
                f"freq={freq!r} from {start}; give the right freq or resample the data."
            )
        moved = np.zeros(len(times), dtype=bool)
        if isinstance(start.freq, (pd.offsets.Tick, pd.offsets.Day)):
            within = times - periods.start_time
            moved = np.asarray(within != within.value_counts().index[0])
        return cls(start, int(positions.max()) + 1, positions, moved)

    @property
    def sorted(self) -> bool:
        """Whether the rows are in order of time."""
        return bool((np.diff(self.positions) >= 0).all())

    @property
    def repeated(self) -> np.ndarray:
        """Positions that more than one row has, int64 [repeats]."""
        return np.flatnonzero(np.bincount(self.positions, minlength=self.length) > 1)

    @property
    def missing(self) -> np.ndarray:
        """Positions that no row has, int64 [gaps]."""
        return np.flatnonzero(np.bincount(self.positions, minlength=self.length) == 0)

    def place(self, values: np.ndarray) -> np.ndarray:
        """`values` [rows, ...] on the grid [length, ...]: NaN in gaps, first of repeated rows."""
        placed = np.full((self.length, *values.shape[1:]), np.nan)
        placed[self.positions[::-1]] = values[::-1]
        return placed


@dataclass(frozen=True, eq=False)
class RegularTable:
    """A table on a regular time grid.

    Parameters
    ----------
    start
        Period of the first row.
    columns
        Names of the series [D].
    values
        float64 [T, D], NaN where missing.
    """

    start: pd.Period
    columns: tuple[str, ...]
    values: np.ndarray


def read_regular_csv(path: PathLike, *, timestamp: str, **options: Any) -> RegularTable:
    """Read a CSV file of one timestamp column and one column per series.

    `options` are `regular_table`'s.

    Raises
    ------
    EvaluationError
        The file, a column, a value or the time grid is unusable.
    """
    frame = read_csv(path, text_columns=[timestamp])
    return regular_table(frame, Path(path).name, timestamp=timestamp, **options)


def regular_table(
    frame: pd.DataFrame,
    where: str,
    *,
    timestamp: str,
    columns: Optional[Sequence[str]],
    freq: Optional[str],
    missing_values: Sequence[float],
    irregular: Irregular,
    time_zone: TimeZone = "local",
) -> RegularTable:
    """Place the rows of a wide frame on a regular time grid.

    `load_wide` describes the parameters; `where` names the frame in messages.

    Raises
    ------
    EvaluationError
        A column, a value or the time grid is unusable.
    """
    if irregular not in ("reindex", "keep", "raise"):
        raise EvaluationError(
            f"irregular={irregular!r} is unknown; choose 'reindex', 'keep' or 'raise'."
        )
    require_columns(frame, [timestamp, *(columns or [])], where)
    names = [name for name in frame.columns if name != timestamp] if columns is None else columns
    if not names:
        raise EvaluationError(f"{where}: there is no column beside {timestamp!r}; add the series.")
    times = parse_times(frame[timestamp], where, time_zone)
    values = np.stack([numeric(frame[name], where) for name in names], axis=1)
    values[np.isin(values, np.asarray(missing_values, dtype=np.float64))] = np.nan

    freq = infer_freq(times, where) if freq is None else period_freq(freq)
    grid = Grid.locate(times, freq, where)
    flaws = _describe_flaws(grid, freq)
    if flaws and irregular == "raise":
        raise EvaluationError(
            f"{where}: the dates are not a regular grid of freq={freq!r}: {flaws}; pass "
            "irregular='reindex' to complete it with missing values, or irregular='keep' to take "
            "the rows as if they were evenly spaced."
        )
    if flaws:
        done = (
            "completed with missing values, the first of repeated rows kept (irregular='reindex')"
            if irregular == "reindex"
            else "rows taken as if evenly spaced (irregular='keep')"
        )
        warnings.warn(f"{where}: {flaws}; {done}.", DataWarning, stacklevel=4)
    if irregular == "reindex":
        values = grid.place(values)
    return RegularTable(grid.start, tuple(map(str, names)), values)


def _describe_flaws(grid: Grid, freq: str) -> str:
    parts = []
    for label, positions in (("repeated", grid.repeated), ("missing", grid.missing)):
        if len(positions):
            first = (grid.start + int(positions[0])).start_time
            parts.append(f"{len(positions)} timestamps {label} (first {first})")
    if grid.moved.any():
        parts.append(f"{np.count_nonzero(grid.moved)} timestamps off the grid")
    if not grid.sorted:
        parts.append("rows out of order")
    return " and ".join(parts)
