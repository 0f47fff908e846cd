"""What an entry's fields must look like, and one check of them for all models."""

import dataclasses
import math
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from gluonts.core.component import equals
from gluonts.dataset.field_names import FieldName
from torch.distributions import constraints

from .frequencies import parse_frequency, to_period

TARGET = FieldName.TARGET
FEAT_DYNAMIC_REAL = FieldName.FEAT_DYNAMIC_REAL
PAST_FEAT_DYNAMIC_REAL = FieldName.PAST_FEAT_DYNAMIC_REAL
FEAT_STATIC_REAL = FieldName.FEAT_STATIC_REAL
FEAT_STATIC_CAT = FieldName.FEAT_STATIC_CAT

_SUPPORTS = {
    constraints.nonnegative_integer: "whole numbers of at least 0",
    constraints.nonnegative: "at least 0",
    constraints.positive: "greater than 0",
    constraints.unit_interval: "between 0 and 1",
}


class FrozenSettings:
    """Base of the frozen dataclasses of settings: lets GluonTS serialise them."""

    def __getnewargs_ex__(self) -> Tuple[Tuple[()], Dict[str, Any]]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return (), {field.name: getattr(self, field.name) for field in fields}


@dataclasses.dataclass(frozen=True)
class WindowConfig(FrozenSettings):
    """What a window of a series holds.

    Parameters
    ----------
    freq
        Frequency of the series, a pandas alias; ``None`` for that of each series' start.
    prediction_length
        Number of steps to forecast, H.
    context_length
        Number of steps before them that the network reads, L.
    lead_time
        Number of steps between the two.
    target_dim
        Number of channels of the target, C; 1 for univariate series.
    num_feat_dynamic_real
        Number of covariates known over context, lead time and horizon.
    num_past_feat_dynamic_real
        Number of covariates known over the context only.
    num_feat_static_real
        Number of real numbers that describe a series as a whole.
    cardinality
        For each categorical static feature, its number of categories.

    Raises
    ------
    ValueError
        If a length is not positive, a number negative, or the frequency unknown.
    """

    freq: Optional[str]
    prediction_length: int
    context_length: int
    lead_time: int = 0
    target_dim: int = 1
    num_feat_dynamic_real: int = 0
    num_past_feat_dynamic_real: int = 0
    num_feat_static_real: int = 0
    cardinality: Tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.freq is not None:
            parse_frequency(self.freq)
        for name in ("prediction_length", "context_length", "target_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "lead_time",
            "num_feat_dynamic_real",
            "num_past_feat_dynamic_real",
            "num_feat_static_real",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if any(size < 1 for size in self.cardinality):
            raise ValueError(
                f"cardinality={list(self.cardinality)} must hold numbers of at least 1"
            )

    @property
    def future_length(self) -> int:
        """Steps between the end of the context and the end of the horizon."""
        return self.lead_time + self.prediction_length

    @property
    def dynamic_fields(self) -> Dict[str, int]:
        """Width of each field that varies over time, the target first."""
        widths = {
            TARGET: self.target_dim,
            FEAT_DYNAMIC_REAL: self.num_feat_dynamic_real,
            PAST_FEAT_DYNAMIC_REAL: self.num_past_feat_dynamic_real,
        }
        return {name: width for name, width in widths.items() if width}

    @property
    def static_fields(self) -> Dict[str, int]:
        """Width of each field that describes a series as a whole."""
        widths = {
            FEAT_STATIC_REAL: self.num_feat_static_real,
            FEAT_STATIC_CAT: len(self.cardinality),
        }
        return {name: width for name, width in widths.items() if width}


def read_entry(
    entry: Mapping[str, Any],
    position: int,
    config: WindowConfig,
    forecast: bool = False,
    support: constraints.Constraint = constraints.real,
) -> Dict[str, Any]:
    """An entry's start, target and features, checked, time first.

    Parameters
    ----------
    entry
        A GluonTS data entry; fields the configuration does not name are ignored.
    position
        Its place in the dataset, for messages.
    forecast
        Whether the entry is to be forecast, so that ``feat_dynamic_real`` must reach over lead
        time and horizon.
    support
        The values that the target may have.

    Returns
    -------
    dict
        ``start`` (a period), ``target`` ``[time, channel]`` and the configured features,
        ``[time, feature]`` or ``[feature]``, all but the categories float32.

    Raises
    ------
    ValueError
        If a field is missing, has the wrong shape, or holds values that cannot be used.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"item {position} is of type {type(entry).__name__}, not an entry with 'start' and "
            "'target': give a GluonTS dataset, such as PandasDataset for data frames"
        )
    item = f"item {entry.get(FieldName.ITEM_ID, position)!r}"
    for name in (FieldName.START, TARGET, *list(config.dynamic_fields)[1:], *config.static_fields):
        if entry.get(name) is None:
            raise ValueError(
                f"{item} has no field {name!r}, which the estimator was told to expect"
            )
    try:
        start = to_period(entry[FieldName.START], config.freq)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from None
    checked: Dict[str, Any] = {FieldName.START: start}
    for name, width in config.dynamic_fields.items():
        checked[name] = _time_first(entry[name], name, width, item)
    for name, width in config.static_fields.items():
        checked[name] = _static(entry[name], name, width, item, config.cardinality)
    _check_values(checked, item)
    if support is not constraints.real:
        _check_support(checked[TARGET], support, item)
    _check_lengths(checked, item, config, forecast)
    return checked


def _time_first(values: Any, name: str, width: int, item: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{item}: {name} does not consist of numbers ({error})") from None
    if array.ndim == 1:
        array = array[np.newaxis]
    if array.ndim != 2 or array.shape[0] != width:
        expected = f"[{width}, time]" if width > 1 else "[time]"
        remedy = "set target_dim" if name == TARGET else f"set num_{name}"
        raise ValueError(
            f"{item}: {name} has shape {list(np.shape(values))}, not {expected}: "
            f"correct the data or {remedy}"
        )
    return array.T


def _static(
    values: Any, name: str, width: int, item: str, cardinality: Tuple[int, ...]
) -> np.ndarray:
    try:
        array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{item}: {name} does not consist of numbers ({error})") from None
    if array.shape != (width,):
        raise ValueError(
            f"{item}: {name} has shape {list(array.shape)}, not [{width}]: correct the data or set "
            f"num_{name}"
        )
    if name == FEAT_STATIC_REAL:
        return array.astype(np.float32)
    if not np.array_equal(array, np.floor(array)):
        raise ValueError(f"{item}: {name}={array.tolist()} must be whole numbers, one per category")
    categories = array.astype(np.int64)
    for column, (category, size) in enumerate(zip(categories, cardinality)):
        if not 0 <= category < size:
            raise ValueError(
                f"{item}: {name}[{column}]={category} must lie in 0…{size - 1}, "
                f"because cardinality={list(cardinality)}"
            )
    return categories


def _check_values(checked: Mapping[str, Any], item: str) -> None:
    target = checked[TARGET]
    if not np.isfinite(target).any():
        raise ValueError(
            f"{item}: its target has no observed value among {len(target)}: leave the item out"
        )
    for name, values in checked.items():
        if not isinstance(values, np.ndarray) or not np.isinf(values).any():
            continue
        step = int(np.argmax(np.isinf(values).reshape(len(values), -1).any(axis=-1)))
        raise ValueError(
            f"{item}: its {name} is infinite at step {step}: mark missing values with NaN"
        )


def _check_support(target: np.ndarray, support: constraints.Constraint, item: str) -> None:
    outside = np.isfinite(target) & ~support.check(torch.from_numpy(target)).numpy()
    if outside.any():
        step, channel = np.argwhere(outside)[0]
        raise ValueError(
            f"{item}: its target is {target[step, channel]:g} at step {step}, but distr_output "
            f"needs values that are {_describe(support)}: correct the data, or choose "
            "a head for all real numbers such as 'student_t'"
        )


def _describe(support: constraints.Constraint) -> str:
    if support in _SUPPORTS:
        return _SUPPORTS[support]
    if not isinstance(support, constraints.interval):
        return str(support)
    lower, upper = support.lower_bound, support.upper_bound
    if math.isinf(lower):
        return f"at most {upper:g}"
    return f"at least {lower:g}" if math.isinf(upper) else f"between {lower:g} and {upper:g}"


def _check_lengths(
    checked: Mapping[str, Any], item: str, config: WindowConfig, forecast: bool
) -> None:
    history = len(checked[TARGET])
    for name in config.dynamic_fields:
        length = len(checked[name])
        needed = history
        reason = f"as long as the target ({history} steps)"
        if forecast and name == FEAT_DYNAMIC_REAL:
            needed += config.future_length
            reason = (
                f"known over the target ({history} steps) and the {config.future_length} steps "
                "of lead_time and prediction_length: add its future values"
            )
        if length < needed:
            raise ValueError(
                f"{item}: {name} has {length} steps, but needs {needed}, to be {reason}"
            )


@equals.register(FrozenSettings)
def _equal_settings(this: FrozenSettings, that: Any) -> bool:
    if type(this) is not type(that):
        return False
    return equals(this.__getnewargs_ex__()[1], that.__getnewargs_ex__()[1])
