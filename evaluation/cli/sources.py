"""Where series come from: a file read by its columns, or a known data set."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, List, Mapping, Optional, get_args

import pandas as pd
import typer

from ..datasets import (
    Duplicates,
    Entry,
    frame_categories,
    from_long_frame,
    load_jsonl,
    load_m4,
    load_monash,
    load_wide,
)
from ..errors import EvaluationError
from ..frames import Stamp, stamp_of
from ..known_datasets import known_dataset, require_files
from ..long_horizon_data import load_long_horizon
from ..tables import (
    Irregular,
    PathLike,
    TimeZone,
    infer_freq,
    parse_times,
    period_freq,
    read_csv,
    require_columns,
    suggestion,
)
from .console import require_pyarrow

_PANEL = "Data"
_ROWS_TO_TELL_STAMP = 1000


class DataFormat(str, Enum):
    """How series lie in a file."""

    LONG = "long"
    WIDE = "wide"
    M4 = "m4"
    MONASH = "monash"
    JSONL = "jsonl"
    LONG_HORIZON = "long-horizon"


def _option(*names: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, **settings)


@dataclass(frozen=True)
class DataOptions:
    """The options that say which series to read, and how; None where not given."""

    data: Annotated[
        Optional[Path],
        _option(
            "--data",
            help="The file: CSV, Parquet or JSON lines; or a folder of GluonTS's JSON lines.",
        ),
    ] = None
    dataset: Annotated[
        Optional[str], _option("--dataset", help="A known data set; see `moecast datasets`.")
    ] = None
    data_dir: Annotated[
        Optional[Path], _option("--data-dir", help="Where the files of --dataset are.")
    ] = None
    format: Annotated[
        Optional[DataFormat],
        _option(
            "--format",
            help="How series lie in the file: long (a row per item and timestamp, the default), "
            "wide (a column per series), m4, monash (a row per series), jsonl (GluonTS's), or "
            "long-horizon (wide, each channel standardised).",
        ),
    ] = None
    timestamp: Annotated[
        Optional[str], _option("--timestamp", help="Column of timestamps (timestamp; wide: date).")
    ] = None
    item_id: Annotated[
        Optional[str],
        _option(
            "--item-id",
            help="long: column naming the series (item_id); an empty text takes the file as one "
            "series.",
        ),
    ] = None
    target: Annotated[
        Optional[str], _option("--target", help="long: column of the target (target).")
    ] = None
    feat_dynamic_real: Annotated[
        Optional[List[str]],
        _option("--feat-dynamic-real", help="long: column known ahead of time; may be repeated."),
    ] = None
    past_feat_dynamic_real: Annotated[
        Optional[List[str]],
        _option(
            "--past-feat-dynamic-real", help="long: column known of the past; may be repeated."
        ),
    ] = None
    feat_static_cat: Annotated[
        Optional[List[str]],
        _option("--feat-static-cat", help="long: category per series; may be repeated."),
    ] = None
    feat_static_real: Annotated[
        Optional[List[str]],
        _option("--feat-static-real", help="long: number per series; may be repeated."),
    ] = None
    fill_features: Annotated[
        Optional[float],
        _option("--fill-features", help="long: value of covariates where they have none."),
    ] = None
    freq: Annotated[
        Optional[str],
        _option("--freq", help="pandas frequency, such as h, 15min, D, W-SUN, M; else inferred."),
    ] = None
    irregular: Annotated[
        Optional[str],
        _option(
            "--irregular",
            help="Rows out of order, missing or off the grid: reindex (sort and complete, with a "
            "note; the default), raise, or for wide files keep.",
        ),
    ] = None
    duplicates: Annotated[
        Optional[str],
        _option(
            "--duplicates",
            help="long: rows of one item and period: raise (the default), first, last or mean.",
        ),
    ] = None
    time_zone: Annotated[
        Optional[str],
        _option(
            "--time-zone",
            help="Time zones: local (wall time, with a note; the default), utc or raise.",
        ),
    ] = None
    multivariate: Annotated[
        Optional[bool],
        _option(
            "--multivariate/--univariate", help="wide: one series with all columns as channels."
        ),
    ] = None
    test_data: Annotated[Optional[Path], _option("--test-data", help="m4: the test file.")] = None


@dataclass(frozen=True)
class ReadSettings:
    """How a file is read; stored beside a model, which reads the next file in the same way."""

    format: DataFormat = DataFormat.LONG
    timestamp: Optional[str] = None
    item_id: str = "item_id"
    target: str = "target"
    feat_dynamic_real: tuple[str, ...] = ()
    past_feat_dynamic_real: tuple[str, ...] = ()
    feat_static_cat: tuple[str, ...] = ()
    feat_static_real: tuple[str, ...] = ()
    fill_features: Optional[float] = None
    freq: Optional[str] = None
    irregular: Irregular = "reindex"
    duplicates: Duplicates = "raise"
    time_zone: TimeZone = "local"
    multivariate: bool = False
    categories: Optional[Mapping[str, List[Any]]] = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ReadSettings:
        """Of what `to_json` gave; names of other versions are left out."""
        return cls().updated(stored)

    def to_json(self) -> dict[str, Any]:
        stored = dataclasses.asdict(self)
        return {**stored, "format": self.format.value}

    def updated(self, changes: Mapping[str, Any]) -> ReadSettings:
        """With those of `changes` that are settings and not None."""
        names = {field.name for field in dataclasses.fields(self)}
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in changes.items()
            if name in names and value is not None
        }
        if "format" in given:
            given["format"] = DataFormat(given["format"])
        for name, kind in (
            ("irregular", Irregular),
            ("duplicates", Duplicates),
            ("time_zone", TimeZone),
        ):
            if name in given and given[name] not in get_args(kind):
                flag = f"--{name.replace('_', '-')}"
                raise EvaluationError(
                    f"{flag} {given[name]!r}: {suggestion(given[name], get_args(kind))}."
                )
        return dataclasses.replace(self, **given)


@dataclass(frozen=True, eq=False)
class Source:
    """Series as they were read.

    Parameters
    ----------
    name
        Name of the data set in results.
    entries
        GluonTS entries.
    settings
        How they were read, with frequency and categories as found.
    stamp
        Where within their period the timestamps lie, for forecasts to have them there, too.
    prediction_length
        The usual horizon of a known data set.
    """

    name: str
    entries: List[Entry]
    settings: ReadSettings
    stamp: Stamp = "start"
    prediction_length: Optional[int] = None
    files: List[str] = field(default_factory=list)


def read_source(options: DataOptions, stored: ReadSettings = ReadSettings()) -> Source:
    """Read the series that the options name.

    Parameters
    ----------
    options
        What was typed.
    stored
        How to read where the options do not say: what a model stores.

    Raises
    ------
    EvaluationError
        Neither or both of --data and --dataset are given, or the data cannot be used.
    """
    if (options.data is None) == (options.dataset is None):
        raise EvaluationError(
            "give either --data FILE or --dataset NAME (`moecast datasets` lists the names)."
        )
    typed = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    if options.dataset is not None:
        known = known_dataset(options.dataset)
        paths = require_files(known, options.data_dir)
        settings = ReadSettings().updated(known.reading)
        if stored.categories is not None:
            settings = dataclasses.replace(settings, categories=stored.categories)
        settings = settings.updated(typed)
        name, horizon = known.name, known.prediction_length
    else:
        assert options.data is not None
        paths = [options.data, *([options.test_data] if options.test_data is not None else [])]
        settings = stored.updated(typed)
        name, horizon = options.data.name.split(".")[0], None
        if options.format is None and settings.format is DataFormat.LONG:
            settings = _as_stated_by(paths[0], settings)
    from_model = options.data is not None and options.freq is None and stored.freq is not None
    entries, settings, stamp = _read(paths, settings, from_model)
    freqs = {entry["start"].freqstr for entry in entries}
    if len(freqs) > 1:
        raise EvaluationError(
            f"{name}: the series have mixed frequencies {', '.join(sorted(freqs))}; split them."
        )
    settings = dataclasses.replace(settings, freq=freqs.pop())
    return Source(name, entries, settings, stamp, horizon, [str(path) for path in paths])


def _as_stated_by(path: Path, settings: ReadSettings) -> ReadSettings:
    """GluonTS's format for a folder, or JSON lines whose first has a list as target."""
    if path.is_dir():
        return dataclasses.replace(settings, format=DataFormat.JSONL)
    if ".jsonl" in path.suffixes or path.suffix == ".json":
        _require_file(path)
        with path.open(encoding="utf-8", errors="replace") as lines:
            first = next(iter(lines), "")
        try:
            target = json.loads(first).get("target")
        except (ValueError, AttributeError):
            target = None
        if isinstance(target, list):
            return dataclasses.replace(settings, format=DataFormat.JSONL)
    return settings


def _read(
    paths: List[Path], settings: ReadSettings, freq_from_model: bool
) -> tuple[List[Entry], ReadSettings, Stamp]:
    path, freq = paths[0], settings.freq
    timestamp: dict[str, Any] = (
        {} if settings.timestamp is None else {"timestamp": settings.timestamp}
    )
    if settings.format is DataFormat.LONG:
        return _read_long(path, settings, freq_from_model)
    if settings.format is DataFormat.WIDE:
        name = settings.timestamp or "date"
        frame = read_csv(path, text_columns=[name])
        if freq_from_model and name in frame:
            _refuse_other_freq(parse_quietly(frame[name], path.name), freq, path.name)
        entries = load_wide(
            path,
            freq=freq,
            multivariate=settings.multivariate,
            irregular=settings.irregular,
            time_zone=settings.time_zone,
            **timestamp,
        )
        times = parse_quietly(frame[name].iloc[:_ROWS_TO_TELL_STAMP], path.name)
        stamp = stamp_of(times, entries[0]["start"].freqstr)
        return entries, settings, stamp
    if settings.format is DataFormat.LONG_HORIZON:
        dataset = load_long_horizon(path, freq=freq, **timestamp)
        return dataset.entries(multivariate=settings.multivariate), settings, "start"
    if freq is None:
        raise EvaluationError(
            f"--format {settings.format.value} does not state the frequency; give it, as in "
            "--freq h."
        )
    if settings.format is DataFormat.MONASH:
        return load_monash(path, freq=freq, **timestamp), settings, "start"
    if settings.format is DataFormat.M4:
        test = paths[1] if len(paths) > 1 else None
        return load_m4(path, test, freq=freq), settings, "start"
    return load_jsonl(path, freq=freq), settings, "start"


def _read_long(
    path: Path, settings: ReadSettings, freq_from_model: bool
) -> tuple[List[Entry], ReadSettings, Stamp]:
    timestamp = settings.timestamp or "timestamp"
    as_text = [timestamp, *settings.feat_static_cat]
    as_text += [settings.item_id] if settings.item_id else []
    frame = read_frame(path, as_text)
    named = [timestamp, settings.target, *settings.feat_dynamic_real]
    named += [*settings.past_feat_dynamic_real, *settings.feat_static_cat]
    named += [*settings.feat_static_real, *([settings.item_id] if settings.item_id else [])]
    require_columns(frame, named, path.name)
    categories = settings.categories
    if categories is None:
        categories = frame_categories(frame, settings.feat_static_cat)
    if freq_from_model and len(frame):
        longest = frame
        if settings.item_id:
            longest = frame[frame[settings.item_id] == frame[settings.item_id].mode()[0]]
        times = parse_quietly(longest[timestamp], path.name)
        _refuse_other_freq(times, settings.freq, path.name)
    try:
        entries = from_long_frame(
            frame,
            timestamp=timestamp,
            target=settings.target,
            item_id=settings.item_id or None,
            freq=settings.freq,
            feat_dynamic_real=settings.feat_dynamic_real,
            past_feat_dynamic_real=settings.past_feat_dynamic_real,
            feat_static_cat=settings.feat_static_cat,
            feat_static_real=settings.feat_static_real,
            future_length="empty",
            fill_features=settings.fill_features,
            categories=categories,
            irregular="raise" if settings.irregular == "raise" else "reindex",
            duplicates=settings.duplicates,
            time_zone=settings.time_zone,
        )
    except EvaluationError as error:
        text = str(error).removeprefix("frame: ")
        raise EvaluationError(f"{path.name}: {_as_options(text)}") from error
    times = parse_quietly(frame[timestamp].iloc[:_ROWS_TO_TELL_STAMP], path.name)
    stamp = stamp_of(times, entries[0]["start"].freqstr)
    return entries, dataclasses.replace(settings, categories=categories), stamp


def read_frame(path: PathLike, text_columns: List[str]) -> pd.DataFrame:
    """A table as a frame: CSV, Parquet, or JSON lines with an object per row, by its ending.

    `text_columns` are kept as text.

    Raises
    ------
    EvaluationError
        There is no such file, it is none of these, or pyarrow is missing for Parquet.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        _require_file(path)
        require_pyarrow(path)
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path.name}: not a Parquet file ({error}).") from error
    elif path.suffix == ".json" or ".jsonl" in path.suffixes:
        _require_file(path)
        try:
            frame = pd.read_json(path, lines=True, convert_dates=False, dtype=False)
        except ValueError as error:
            raise EvaluationError(f"{path.name}: not JSON lines ({error}).") from error
    else:
        return read_csv(path, text_columns)
    frame.columns = frame.columns.astype(str)
    for name in text_columns:
        if name in frame and not pd.api.types.is_datetime64_any_dtype(frame[name]):
            frame[name] = frame[name].map(str, na_action="ignore")
    return frame


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such file; check the path.")


def _as_options(text: str) -> str:
    """A sentence about arguments of `from_long_frame` in the words of the command line."""
    for name in ("fill_features", "duplicates", "irregular", "time_zone"):
        text = text.replace(f"pass {name}=", f"pass --{name.replace('_', '-')} ")
    return text.replace("or give freq to", "or give --freq to").replace(
        "give freq,", "give --freq,"
    )


def parse_quietly(column: pd.Series, where: str) -> pd.DatetimeIndex:
    """Timestamps of a column that is read for good elsewhere, with the notes on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parse_times(column, where)


def _refuse_other_freq(times: pd.DatetimeIndex, freq: Optional[str], where: str) -> None:
    """Refuse data of another frequency than the model's, where they tell one."""
    assert freq is not None
    try:
        found = infer_freq(times, where)
    except EvaluationError:
        return
    if found != period_freq(freq):
        raise EvaluationError(
            f"{where}: its timestamps are of freq={found!r}, but the model was trained on "
            f"freq={freq!r}; bring the data to that frequency, or give --freq {freq} if steps are "
            "missing between its rows."
        )
