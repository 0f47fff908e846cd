"""Forecasters named by class path, with hyper-parameters typed on a command line."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pydoc import ErrorDuringImport, locate
from typing import Any, Sequence, Union

import numpy as np
from gluonts.dataset.field_names import FieldName
from gluonts.model import Estimator, Predictor

from .backtest import Forecaster, forecaster_name
from .datasets import Entry
from .errors import EvaluationError
from .metrics import DECILES

_QUANTILE_LEVELS = (0.025, *DECILES, 0.975)
_FEATURE_COUNTS = {
    "num_feat_dynamic_real": FieldName.FEAT_DYNAMIC_REAL,
    "num_past_feat_dynamic_real": FieldName.PAST_FEAT_DYNAMIC_REAL,
    "num_feat_static_real": FieldName.FEAT_STATIC_REAL,
    "num_feat_static_cat": FieldName.FEAT_STATIC_CAT,
}
# What `--forecaster` takes beside class paths, with the settings that a class cannot do without.
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "seasonal-naive": ("gluonts.model.seasonal_naive.SeasonalNaivePredictor", {}),
    "dlinear": ("gluonts.torch.DLinearEstimator", {}),
    "patchtst": ("gluonts.torch.PatchTSTEstimator", {"patch_len": 16}),
    "auto-ets": ("gluonts.ext.statsforecast.AutoETSPredictor", {}),
    "auto-theta": ("gluonts.ext.statsforecast.AutoThetaPredictor", {}),
    "mole": ("moecast.forecasters.MoLEEstimator", {}),
    "moirai-moe": ("moecast.forecasters.MoiraiMoEEstimator", {}),
    "autoformer": ("moecast.forecasters.HierarchicalAutoformerEstimator", {}),
}


@dataclass(frozen=True)
class ForecasterSpec:
    """A forecaster class and what its constructor is to be given.

    Parameters
    ----------
    name
        Name in the results.
    cls
        The class, an `Estimator` or `Predictor`.
    settings
        Hyper-parameters that the user set.
    """

    name: str
    cls: type
    settings: dict[str, Any] = field(default_factory=dict)

    def takes(self, parameter: str) -> bool:
        """Whether the constructor has `parameter`, or takes any."""
        parameters = inspect.signature(self.cls.__init__).parameters.values()  # type: ignore[misc]
        return any(p.name == parameter or p.kind is p.VAR_KEYWORD for p in parameters)

    def _names(self, parameter: str) -> bool:
        """Whether the constructor, or that of the model it wraps, has just this parameter."""
        # GluonTS's wrappers of statsforecast hand all they do not know on to their `ModelType`.
        wrapped = getattr(self.cls, "ModelType", None)
        return any(
            parameter in inspect.signature(cls.__init__).parameters  # type: ignore[misc]
            for cls in (self.cls, wrapped)
            if cls is not None
        )

    def build(self, **context: Any) -> Forecaster:
        """Construct the forecaster.

        Parameters
        ----------
        **context
            What data and protocol imply, such as `freq` and `prediction_length`: given where the
            constructor takes it and neither None nor set by the user. Where both are dictionaries,
            as `trainer_kwargs`, the user's entries come over these.

        Raises
        ------
        EvaluationError
            The constructor refuses its arguments.
        """
        arguments = dict(self.settings)
        # Forecasts that hold no distribution are asked for the quantiles that are scored.
        for name, value in {"quantile_levels": list(_QUANTILE_LEVELS), **context}.items():
            if isinstance(value, dict) and isinstance(arguments.get(name), dict):
                arguments[name] = {**value, **arguments[name]}
            elif value is not None and self._names(name):
                arguments.setdefault(name, value)
        try:
            return self.cls(**arguments)
        except (ValueError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EvaluationError(
                f"{self.name} cannot be made: {reason}; see help({self.cls.__module__}."
                f"{self.cls.__qualname__}) for what --set can give."
            ) from error


def parse_forecasters(paths: Sequence[str], assignments: Sequence[str]) -> list[ForecasterSpec]:
    """Find forecaster classes and hand each the hyper-parameters meant for it.

    Parameters
    ----------
    paths
        `package.module.Class` or one of `SHORT_NAMES`, or `NAME=…` to name it in the results.
    assignments
        `parameter=value` for every forecaster that takes it, or `NAME.parameter=value` for one.
        Values are decoded as JSON where they parse, and are text otherwise.

    Raises
    ------
    EvaluationError
        A path is no forecaster, two have one name, or an assignment fits none of them.
    """
    specs: dict[str, ForecasterSpec] = {}
    for text in paths:
        name, separator, path = text.rpartition("=")
        path, settings = SHORT_NAMES.get(path, (path, {}))
        cls = _locate(path)
        name = name if separator else forecaster_name(cls)
        if name in specs:
            raise EvaluationError(
                f"two forecasters are named {name!r}; name one, as in --forecaster other={path}."
            )
        specs[name] = ForecasterSpec(name, cls, dict(settings))
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise EvaluationError(f"--set {text!r} is not of the form name=value.")
        scope, dot, parameter = key.partition(".")
        if not dot:
            scope, parameter = "", key
        if scope and scope not in specs:
            raise EvaluationError(
                f"--set {text!r}: there is no forecaster {scope!r}; choose among "
                f"{', '.join(specs)}."
            )
        takers = [spec for spec in specs.values() if scope in ("", spec.name)]
        takers = [spec for spec in takers if spec.takes(parameter)]
        if not takers:
            raise EvaluationError(
                f"--set {text!r}: {scope or ' or '.join(specs)} has no parameter {parameter!r}; "
                "check its spelling."
            )
        for spec in takers:
            spec.settings[parameter] = _decode(value)
    return list(specs.values())


def dimensions(dataset: Sequence[Entry]) -> dict[str, Union[int, list[int]]]:
    """Constructor arguments, by GluonTS's names, that tell the sizes of the fields in `dataset`.

    `target_dim` is there where targets are multivariate, a number of features where there are any;
    `cardinality` is one more than the greatest category of each static column.
    """
    first = dataset[0]
    sizes: dict[str, Union[int, list[int]]] = {
        parameter: len(first[name]) for parameter, name in _FEATURE_COUNTS.items() if name in first
    }
    if np.ndim(first[FieldName.TARGET]) == 2:
        sizes["target_dim"] = len(first[FieldName.TARGET])
    if FieldName.FEAT_STATIC_CAT in first:
        categories = np.stack([entry[FieldName.FEAT_STATIC_CAT] for entry in dataset])
        sizes["cardinality"] = [int(greatest) + 1 for greatest in categories.max(axis=0)]
    return sizes


def _locate(path: str) -> type:
    try:
        found = locate(path.replace(":", "."))
    except ErrorDuringImport as error:
        raise EvaluationError(f"--forecaster {path!r} fails to import: {error.value}.") from error
    if not (isinstance(found, type) and issubclass(found, (Estimator, Predictor))):
        what = "there is no such class" if found is None else "not an Estimator or Predictor class"
        raise EvaluationError(
            f"--forecaster {path!r}: {what}; give a path such as gluonts.torch.DLinearEstimator, "
            f"or one of {', '.join(SHORT_NAMES)}."
        )
    return found


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
