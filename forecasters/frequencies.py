"""What a pandas frequency means, under its old and its new aliases alike."""

import warnings
from functools import lru_cache
from typing import Any, List, Optional

import pandas as pd
from gluonts.time_feature import TimeFeature, time_features_from_frequency_str
from pandas.tseries import offsets
from pandas.tseries.frequencies import to_offset

_NEW_ALIASES = {"H": "h", "T": "min", "S": "s", "L": "ms", "U": "us", "N": "ns"}
_END_ALIASES = {"M": "ME", "Q": "QE", "A": "YE", "Y": "YE", "AS": "YS"}

_GRANULARITIES = {
    offsets.YearBegin: "year",
    offsets.YearEnd: "year",
    offsets.QuarterBegin: "quarter",
    offsets.QuarterEnd: "quarter",
    offsets.MonthBegin: "month",
    offsets.MonthEnd: "month",
    offsets.Week: "week",
    offsets.BusinessDay: "day",
    offsets.Day: "day",
    offsets.Hour: "hour",
    offsets.Minute: "minute",
    offsets.Second: "second",
    offsets.Milli: "millisecond",
    offsets.Micro: "microsecond",
    offsets.Nano: "nanosecond",
}

_PERIOD_ENDS = (offsets.YearEnd, offsets.QuarterEnd)
_PERIOD_ALIASES = {"year": "Y", "quarter": "Q", "month": "M"}


@lru_cache(maxsize=256)
def parse_frequency(freq: str) -> offsets.BaseOffset:
    """The offset that a frequency string stands for.

    Parameters
    ----------
    freq
        A pandas alias, old (``"H"``, ``"10T"``, ``"M"``) or new (``"h"``, ``"10min"``, ``"ME"``).

    Raises
    ------
    ValueError
        If pandas knows no such frequency, or a series of periods cannot have it.
    """
    count = freq[: len(freq) - len(freq.lstrip("0123456789"))]
    name, dash, anchor = freq[len(count) :].partition("-")
    offset = None
    for alias in (name, _NEW_ALIASES.get(name), _END_ALIASES.get(name)):
        if alias is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                offset = to_offset(f"{count}{alias}{dash}{anchor}")
                break
            except ValueError:
                continue
    if offset is None or type(offset) not in _GRANULARITIES or offset.n < 1:
        raise ValueError(
            f"freq={freq!r} is no frequency that series can have: "
            "use a pandas alias such as 'h', '15min', 'D', 'W-SUN', 'M', 'Q' or 'Y'"
        )
    return offset


def granularity(freq: str) -> str:
    """The unit of a frequency: ``"hour"`` for ``"2h"``, ``"day"`` for ``"B"``, and so on."""
    return _GRANULARITIES[type(parse_frequency(freq))]


def same_frequency(freq: str, offset: offsets.BaseOffset) -> bool:
    """Whether an offset has the unit and the multiple of ``freq``; anchors may differ."""
    expected = parse_frequency(freq)
    unit = _GRANULARITIES.get(type(offset))
    return unit == _GRANULARITIES[type(expected)] and offset.n == expected.n


def to_period(start: Any, freq: Optional[str]) -> pd.Period:
    """A series' start as a period.

    Parameters
    ----------
    start
        A period, which keeps its own frequency, or a timestamp or string, which takes ``freq``.
    freq
        ``None`` takes periods of any frequency, and nothing else.

    Raises
    ------
    ValueError
        If ``start`` is a period of another frequency, or no point in time at all.
    """
    if freq is None:
        if isinstance(start, pd.Period):
            return start
        raise ValueError(
            f"start={start!r} is no period, and there is no freq to make it one: give freq, or "
            "series that start with a pandas.Period"
        )
    if isinstance(start, pd.Period):
        if not same_frequency(freq, start.freq):
            raise ValueError(
                f"start={start} has frequency {start.freqstr!r}, not freq={freq!r}: "
                "resample the series or give the estimator their frequency"
            )
        return start
    offset = parse_frequency(freq)
    alias = _PERIOD_ALIASES.get(granularity(freq))
    period_freq = offset.freqstr
    if alias is not None:
        anchor = offset.freqstr.partition("-")[2] if isinstance(offset, _PERIOD_ENDS) else ""
        period_freq = f"{offset.n}{alias}{'-' if anchor else ''}{anchor}"
    try:
        return pd.Period(start, freq=period_freq)
    except (TypeError, ValueError) as error:
        raise ValueError(f"start={start!r} is no point in time: {error}") from error


@lru_cache(maxsize=256)
def time_features(freq: Optional[str]) -> List[TimeFeature]:
    """GluonTS's time features of a frequency, coarser units only, each within [-0.5, 0.5].

    For hours these are the four that MoLE's calendar router reads (Ni et al. 2024, section 3.2).
    Below one second, for years, and for no frequency there are none.
    """
    if freq is None:
        return []
    offset = parse_frequency(freq)
    if granularity(freq) in ("millisecond", "microsecond", "nanosecond"):
        return []
    return time_features_from_frequency_str(offset.freqstr)
