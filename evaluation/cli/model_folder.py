"""A model's folder: the predictor as it serialises itself, and beside it how its data were read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, List, Mapping, Optional

import pandas as pd
import typer

from ...distributions import support_of
from ...forecasters import (
    HierarchicalAutoformerEstimator,
    MoEEstimator,
    MoEPredictor,
    MoiraiMoEEstimator,
    MoLEEstimator,
)
from ...forecasters.fields import WindowConfig, read_entry
from ..datasets import Entry
from ..environment import version_of
from ..errors import EvaluationError
from .console import sentences_from
from .sources import ReadSettings

MODELS: dict[str, type[MoEEstimator]] = {
    "mole": MoLEEstimator,
    "moirai-moe": MoiraiMoEEstimator,
    "autoformer": HierarchicalAutoformerEstimator,
}

ModelDir = Annotated[
    Path, typer.Argument(help="A folder that `moecast train` wrote.", metavar="MODEL_DIR")
]
Device = Annotated[
    Optional[str], typer.Option("--device", help="A torch device; by default the best.")
]

_RECORD = "moecast.json"
_FORMAT = 1
_VERSION = version_of("moecast")


@dataclass(frozen=True)
class Record:
    """What a model's folder says of its making.

    Parameters
    ----------
    model
        Name of the model, a key of `MODELS`.
    reading
        How the training data were read.
    trained_until
        The last period that was trained on, by series, as text.
    holdout
        Windows at the end of each series that were left out of training.
    settings, command, files, training
        Constructor arguments, the command as typed, the data files, and what training measured.
    """

    model: str
    reading: ReadSettings
    trained_until: Mapping[str, str]
    holdout: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    files: List[str] = field(default_factory=list)
    training: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        content = {
            "format": _FORMAT,
            "moecast": _VERSION,
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "reading": self.reading.to_json(),
        }
        text = json.dumps(content, indent=1, default=str)
        (folder / _RECORD).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A predictor read from its folder, and the record of its making if there is one."""

    name: str
    predictor: MoEPredictor
    record: Optional[Record]

    @property
    def window(self) -> WindowConfig:
        return self.predictor.network.window

    @property
    def reading(self) -> ReadSettings:
        """How the model's data are read; of a folder without record, by the defaults."""
        return ReadSettings(freq=self.window.freq) if self.record is None else self.record.reading

    def check(self, entries: List[Entry], where: str, *, forecast: bool) -> None:
        """Refuse series that the model cannot read.

        Raises
        ------
        EvaluationError
            A field is missing, too short or malformed.
        """
        check_entries(
            entries,
            self.window,
            support_of(self.predictor.network.distr_output),
            where,
            forecast=forecast,
        )

    def trained_until(self, entry: Entry) -> Optional[pd.Period]:
        """The last period of a series that was trained on; None if the record does not tell."""
        if self.record is None:
            return None
        text = self.record.trained_until.get(str(entry["item_id"]))
        return None if text is None else pd.Period(text, freq=entry["start"].freq)


def check_entries(
    entries: List[Entry], window: WindowConfig, support: Any, where: str, *, forecast: bool
) -> None:
    """Refuse entries that do not have what `window` says, before any work starts.

    Raises
    ------
    EvaluationError
        The first fault, with the item's name.
    """
    with sentences_from(ValueError, before=f"{where}: "):
        for number, entry in enumerate(entries):
            read_entry(entry, number, window, forecast=forecast, support=support)


def load_model(folder: Path, device: Optional[str] = None) -> SavedModel:
    """Read a model's folder.

    Raises
    ------
    EvaluationError
        It is no such folder, is damaged, or was written by a version that this one cannot read.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"{folder}: there is no such folder; give the --out of `moecast train`."
        )
    record = _read_record(folder)
    try:
        described = json.loads((folder / "gluonts-config.json").read_text(encoding="utf-8"))
        name = described["type"]
    except FileNotFoundError:
        raise EvaluationError(
            f"{folder}: not a model folder, it has no gluonts-config.json; give the --out of "
            "`moecast train`."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{folder}: gluonts-config.json is damaged ({error}); train the model again."
        ) from error
    classes = {f"{c.__module__}.{c.__qualname__}": c for c in _predictor_classes()}
    if name not in classes:
        raise EvaluationError(
            f"{folder}: it holds a {name}, which is no model of moecast {_VERSION}; read "
            "it with the version or library that wrote it."
        )
    # torch says of a device that it was not built for: AssertionError.
    refusals = (ValueError,) if device is None else (ValueError, RuntimeError, AssertionError)
    with sentences_from(*refusals, before="" if device is None else f"--device {device}: "):
        predictor = classes[name].deserialize(folder, device)
    return SavedModel(folder.resolve().name, predictor, record)


def _predictor_classes() -> set[type[MoEPredictor]]:
    return {cls.predictor_class for cls in MODELS.values()}


def _read_record(folder: Path) -> Optional[Record]:
    path = folder / _RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content["format"]
        if written != _FORMAT:
            raise EvaluationError(
                f"{folder}: written by moecast {content.get('moecast')} in format {written}, but "
                f"moecast {_VERSION} reads format {_FORMAT}; use that version, or train "
                "the model again."
            )
        names = Record.__dataclass_fields__
        known = {name: value for name, value in content.items() if name in names}
        known["reading"] = ReadSettings.from_json(known["reading"])
        return Record(**known)
    except EvaluationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is damaged ({type(error).__name__}: {error}); train the model again."
        ) from error
