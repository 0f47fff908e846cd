"""Loaders: each gives GluonTS entries with a `pandas.Period` start, float32 target and item id."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import pandas as pd
from gluonts.dataset.common import FileDataset
from gluonts.dataset.field_names import FieldName
from gluonts.dataset.jsonl import JsonLinesFile
from gluonts.exceptions import GluonTSDataError

from .errors import EvaluationError
from .tables import (
    Grid,
    Irregular,
    PathLike,
    infer_freq,
    numeric,
    parse_times,
    period_freq,
    read_csv,
    read_regular_csv,
    require_columns,
)

Entry = dict[str, Any]

_ITEMS_TO_INFER_FREQ = 20
_JSON_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")


def series_entries(
    start: pd.Period,
    columns: Sequence[str],
    values: np.ndarray,
    *,
    name: Optional[str] = None,
) -> list[Entry]:
    """Entries of a table `values` [T, D]: one per column, or with `name` one multivariate entry.

    Returns
    -------
    list of dict
        D entries with targets float32 [T], or one entry `name` with a target float32 [D, T].
    """
    target = np.ascontiguousarray(values.T, dtype=np.float32)
    if name is not None:
        return [{FieldName.ITEM_ID: name, FieldName.START: start, FieldName.TARGET: target}]
    return [
        {FieldName.ITEM_ID: column, FieldName.START: start, FieldName.TARGET: target[index]}
        for index, column in enumerate(columns)
    ]


def load_wide(
    path: PathLike,
    *,
    timestamp: str = "date",
    columns: Optional[Sequence[str]] = None,
    freq: Optional[str] = None,
    multivariate: bool = False,
    missing_values: Sequence[float] = (-9999.0,),
    irregular: Irregular = "reindex",
) -> list[Entry]:
    """Load a CSV file with a timestamp column and one column per series.

    Parameters
    ----------
    path
        The file; its header may be badly encoded and its lines may end in CRLF.
    timestamp
        Name of the timestamp column.
    columns
        Names of the series' columns; all others by default.
    freq
        pandas frequency; inferred from the timestamps by default.
    multivariate
        Give one entry with a target [D, T] instead of D entries.
    missing_values
        Numbers that stand for a missing value (−9999 in the Weather data).
    irregular
        What to do where timestamps repeat or are missing: `"reindex"` completes the grid with NaN
        and keeps the first of repeated rows, `"keep"` takes the rows as if they were evenly spaced;
        both warn with one sentence. `"raise"` refuses.

    Raises
    ------
    EvaluationError
        The file, a column, a value or the time grid is unusable.
    """
    table = read_regular_csv(
        path,
        timestamp=timestamp,
        columns=columns,
        freq=freq,
        missing_values=missing_values,
        irregular=irregular,
    )
    name = Path(path).stem if multivariate else None
    return series_entries(table.start, table.columns, table.values, name=name)


def load_monash(
    path: PathLike,
    *,
    freq: str,
    item_id: str = "series_name",
    timestamp: str = "start_timestamp",
) -> list[Entry]:
    """Load a wide file of the Monash archive: one series per row.

    Parameters
    ----------
    path
        CSV file with a column of names, one of start timestamps and the values `V1`, `V2`, … of
        each series, padded with blanks at the end.
    freq
        pandas frequency of the series, which the file does not state.
    item_id, timestamp
        Names of the first two columns.

    Raises
    ------
    EvaluationError
        The file, a column or a value is unusable, or a series has no value.
    """
    where = Path(path).name
    frame = read_csv(path, text_columns=[item_id, timestamp])
    require_columns(frame, [item_id, timestamp], where)
    starts = parse_times(frame[timestamp], where).to_period(period_freq(freq))
    rows = _value_rows(frame.drop(columns=[item_id, timestamp]), frame[item_id], where)
    return [
        {FieldName.ITEM_ID: name, FieldName.START: start, FieldName.TARGET: row}
        for name, start, row in zip(frame[item_id], starts, rows)
    ]


def load_m4(
    train: PathLike,
    test: Optional[PathLike] = None,
    *,
    freq: str,
    start: str = "2000-01-03",
) -> list[Entry]:
    """Load M4's wide files: one series per row, its name first.

    Parameters
    ----------
    train, test
        CSV files `V1, V2, …` whose rows are padded with blanks at the end. The test file's values
        follow the training file's, series matched by name, so that a backtest with one window of
        the test file's length forecasts exactly the test file.
    freq
        pandas frequency of the series.
    start
        Timestamp of every series' first value; these files state none.

    Raises
    ------
    EvaluationError
        A file or value is unusable, a series has no value, or the two files name different series.
    """
    first = pd.Period(start, freq=period_freq(freq))
    series = _read_m4(train)
    if test is not None:
        future = _read_m4(test)
        odd = sorted(series.keys() ^ future.keys())
        if odd:
            raise EvaluationError(
                f"{Path(test).name}: series {odd[0]!r} is in only one of the two files; give the "
                "training and test file of the same frequency."
            )
        series = {name: np.concatenate([past, future[name]]) for name, past in series.items()}
    return [
        {FieldName.ITEM_ID: name, FieldName.START: first, FieldName.TARGET: target}
        for name, target in series.items()
    ]


def _read_m4(path: PathLike) -> dict[str, np.ndarray]:
    frame = read_csv(path)
    names = frame.iloc[:, 0].astype("str")
    return dict(zip(names, _value_rows(frame.iloc[:, 1:], names, Path(path).name)))


def _value_rows(values: pd.DataFrame, names: pd.Series, where: str) -> list[np.ndarray]:
    """The rows of `values` [series, T] as float32 without the blanks that pad their ends."""
    if names.duplicated().any():
        raise EvaluationError(
            f"{where}: series {names[names.duplicated()].iloc[0]!r} occurs twice; name each once."
        )
    table = np.stack([numeric(values[name], where) for name in values.columns], axis=1)
    rows = []
    for name, row in zip(names, table):
        observed = np.flatnonzero(~np.isnan(row))
        if not len(observed):
            raise EvaluationError(f"{where}: series {name!r} has no value; remove its row.")
        rows.append(row[: observed[-1] + 1].astype(np.float32))
    return rows


def from_long_frame(
    frame: pd.DataFrame,
    *,
    timestamp: str = "timestamp",
    target: str = "target",
    item_id: Optional[str] = "item_id",
    freq: Optional[str] = None,
    feat_dynamic_real: Sequence[str] = (),
    past_feat_dynamic_real: Sequence[str] = (),
    feat_static_cat: Sequence[str] = (),
    feat_static_real: Sequence[str] = (),
    future_length: int = 0,
    fill_features: Optional[float] = None,
) -> list[Entry]:
    """Entries of a long frame: one row per item and timestamp.

    Rows are sorted by time and each item's grid is completed: a gap is a missing target (NaN).
    `gluonts.dataset.pandas.PandasDataset` refuses gaps, keeps float64 and names neither item nor
    timestamp where a frame is unusable, hence this function.

    Parameters
    ----------
    frame
        The rows, in any order; it is not changed.
    timestamp, target, item_id
        Names of columns; `item_id=None` takes the frame as one series named `target`.
    freq
        pandas frequency; by default inferred from the longest item that is regular.
    feat_dynamic_real, past_feat_dynamic_real
        Names of columns known in the future too, and of columns known in the past only.
    feat_static_cat, feat_static_real
        Names of columns with one value per item. Categories become their rank among the column's
        sorted values.
    future_length
        Number of last rows of every item that hold only `feat_dynamic_real`: targets and past
        features end that many rows earlier.
    fill_features
        Value of dynamic features where the frame has none, in gaps or as blanks; by default such a
        frame is refused, because few forecasters can take it.

    Returns
    -------
    list of dict
        Entries in the order in which items first appear: target float32 [T], feat_dynamic_real
        float32 [features, T + future_length], past_feat_dynamic_real float32 [features, T],
        feat_static_cat int32 [features], feat_static_real float32 [features].

    Raises
    ------
    EvaluationError
        A column is missing, an item has two rows for one period, a static column has two values
        for one item, or a dynamic feature has none for a row and `fill_features` is not given.
    """
    if item_id is None:
        item_id = "item_id"
        frame = frame.assign(item_id=target)
    dynamic = [*feat_dynamic_real, *past_feat_dynamic_real]
    static = [*feat_static_cat, *feat_static_real]
    require_columns(frame, [timestamp, target, item_id, *dynamic, *static], "frame")
    if frame[item_id].isna().any():
        raise EvaluationError(f"frame: column {item_id!r} has blanks; name every row's item.")
    frame = frame.assign(**{timestamp: parse_times(frame[timestamp], "frame")})
    if freq is None:
        freq = _frame_freq(frame, timestamp, item_id)
    freq = period_freq(freq)
    categories = {name: sorted(frame[name].dropna().unique()) for name in feat_static_cat}

    entries = []
    for item, rows in frame.groupby(item_id, sort=False, observed=True):
        where = f"item {item!r}"
        grid = Grid.locate(pd.DatetimeIndex(rows[timestamp]), freq, where)
        if len(grid.repeated):
            raise EvaluationError(
                f"{where}: two rows for {grid.start + int(grid.repeated[0])}; keep one of them."
            )
        past = grid.length - future_length
        if past < 1:
            raise EvaluationError(
                f"{where}: {grid.length} rows, so none is left before future_length="
                f"{future_length}; give fewer future rows."
            )

        def placed(
            name: str, rows: pd.DataFrame = rows, grid: Grid = grid, where: str = where
        ) -> np.ndarray:
            return grid.place(numeric(rows[name], where)).astype(np.float32)

        def features(names: Sequence[str], where: str = where, grid: Grid = grid) -> np.ndarray:
            return np.stack([_complete(placed(n), n, grid, where, fill_features) for n in names])

        entry: Entry = {
            FieldName.ITEM_ID: str(item),
            FieldName.START: grid.start,
            FieldName.TARGET: placed(target)[:past],
        }
        if feat_dynamic_real:
            entry[FieldName.FEAT_DYNAMIC_REAL] = features(feat_dynamic_real)
        if past_feat_dynamic_real:
            entry[FieldName.PAST_FEAT_DYNAMIC_REAL] = features(past_feat_dynamic_real)[:, :past]
        if feat_static_cat:
            codes = [categories[n].index(_only_value(rows[n], where)) for n in feat_static_cat]
            entry[FieldName.FEAT_STATIC_CAT] = np.array(codes, dtype=np.int32)
        if feat_static_real:
            reals = [_only_value(rows[name], where) for name in feat_static_real]
            entry[FieldName.FEAT_STATIC_REAL] = np.array(reals, dtype=np.float32)
        entries.append(entry)
    return entries


def _frame_freq(frame: pd.DataFrame, timestamp: str, item_id: str) -> str:
    longest_first = frame[item_id].value_counts().index[:_ITEMS_TO_INFER_FREQ]
    for item in longest_first:
        times = pd.DatetimeIndex(frame.loc[frame[item_id] == item, timestamp]).sort_values()
        freq = pd.infer_freq(times) if len(times) >= 3 else None
        if freq is not None:
            return period_freq(freq)
    longest = frame.loc[frame[item_id] == longest_first[0], timestamp]
    return infer_freq(pd.DatetimeIndex(longest), "frame")


def _complete(
    values: np.ndarray, name: str, grid: Grid, where: str, fill: Optional[float]
) -> np.ndarray:
    gaps = np.flatnonzero(np.isnan(values))
    if not len(gaps):
        return values
    if fill is None:
        raise EvaluationError(
            f"{where}: feature {name!r} has no value in {len(gaps)} periods, first "
            f"{grid.start + int(gaps[0])}; fill them in the frame or pass fill_features=0.0."
        )
    return np.nan_to_num(values, nan=fill)


def _only_value(column: pd.Series, where: str) -> Any:
    values = column.dropna().unique()
    if len(values) != 1:
        raise EvaluationError(
            f"{where}: static column {column.name!r} has {len(values)} values; give it exactly one "
            "per item."
        )
    return values[0]


def load_long_csv(path: PathLike, *, timestamp: str = "timestamp", **columns: Any) -> list[Entry]:
    """Load a long CSV file; `columns` are `from_long_frame`'s arguments.

    Raises
    ------
    EvaluationError
        The file is unusable, or what `from_long_frame` raises.
    """
    return from_long_frame(read_csv(path, text_columns=[timestamp]), timestamp=timestamp, **columns)


def load_jsonl(path: PathLike, *, freq: str) -> list[Entry]:
    """Load GluonTS's JSON lines through GluonTS's own `FileDataset`.

    Parameters
    ----------
    path
        A file `.json`, `.jsonl`, `.json.gz` or `.jsonl.gz`, or a folder of such files, read in
        order of their names; `metadata.json` is left out.
    freq
        pandas frequency of the series.

    Returns
    -------
    list of dict
        Entries with all fields of their lines. Targets are float32 [T], or [D, T] where the first
        line's is nested; a line without `item_id` is named by its number, from 0.

    Raises
    ------
    EvaluationError
        There is no such file, a line is no JSON, or a field is missing or malformed.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    files = [
        file
        for file in files
        if file.name.endswith(_JSON_SUFFIXES)
        and file.name != "metadata.json"
        and not file.name.startswith(".")
    ]
    if not files:
        raise EvaluationError(
            f"{path}: there is no JSON lines file ({', '.join(_JSON_SUFFIXES)}); check the path."
        )
    entries: list[Entry] = []
    for file in files:
        entries.extend(_read_jsonl(file, period_freq(freq)))
    for number, entry in enumerate(entries):
        entry[FieldName.ITEM_ID] = str(entry.get(FieldName.ITEM_ID, number))
    return entries


def _read_jsonl(file: Path, freq: str) -> list[Entry]:
    try:
        lines = JsonLinesFile(file)
        if not len(lines):
            raise EvaluationError(f"{file.name}: there is no line in it; check the file.")
        target = next(iter(lines)).get(FieldName.TARGET)
        nested = bool(target) and isinstance(target[0], list)
        return list(FileDataset(file, freq=freq, one_dim_target=not nested))
    except EvaluationError:
        raise
    except (GluonTSDataError, ValueError) as error:
        raise EvaluationError(f"{file.name}: {str(error)[:200]}; correct that line.") from error
