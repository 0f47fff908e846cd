"""Public data sets known by name: where they are looked for, what is in them, how they are read."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from .errors import EvaluationError
from .tables import PathLike, suggestion

DATA_VARIABLE = "MOECAST_DATA"

_GITHUB = "https://raw.githubusercontent.com"
_ETT = f"{_GITHUB}/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
_M4 = f"{_GITHUB}/Mcompetitions/M4-methods/6c1067e5a57161249b17289a565178dc7a3fb3ca/Dataset"
_SKFORECAST = (
    f"{_GITHUB}/skforecast/skforecast-datasets/f8c3d7fe5ec41ef86f93e969c31ec4b469b7c949/data"
)
_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class KnownFile:
    """A file of a data set.

    Parameters
    ----------
    name
        Its name in the data folder.
    url
        Where its publisher has it, at a fixed revision; None if it is published otherwise, as an
        archive or in another format, so that it must be put there by hand.
    sha256
        Checksum of the published file; None where there is no `url`.
    """

    name: str
    url: Optional[str] = None
    sha256: Optional[str] = None


@dataclass(frozen=True)
class KnownDataset:
    """A public data set.

    Parameters
    ----------
    name
        What `--dataset` takes.
    title
        What is in it.
    files
        Its files; of M4's the training file first.
    source, licence
        Who published it, and under which licence ("not stated" where they do not say).
    prediction_length
        The horizon that it is usually forecast over.
    reading
        How its file is read: `format` and the other settings by their names on the command line.
    """

    name: str
    title: str
    files: tuple[KnownFile, ...]
    source: str
    licence: str
    prediction_length: int
    reading: dict[str, Any] = field(default_factory=dict)


_WALMART_COVARIATES = ("Temperature", "Fuel_Price", "CPI", "Unemployment")

KNOWN_DATASETS = {
    known.name: known
    for known in (
        KnownDataset(
            "ETTh1",
            "Electricity transformer temperature, 7 hourly series, 2016-2018",
            (
                KnownFile(
                    "ETTh1.csv",
                    f"{_ETT}/ETTh1.csv",
                    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
                ),
            ),
            "zhouhaoyi/ETDataset",
            "CC BY-ND 4.0",
            96,
            {"format": "wide", "timestamp": "date"},
        ),
        KnownDataset(
            "ETTm1",
            "Electricity transformer temperature, 7 series every 15 minutes, 2016-2018",
            (
                KnownFile(
                    "ETTm1.csv",
                    f"{_ETT}/ETTm1.csv",
                    "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
                ),
            ),
            "zhouhaoyi/ETDataset",
            "CC BY-ND 4.0",
            96,
            {"format": "wide", "timestamp": "date"},
        ),
        KnownDataset(
            "m4_hourly",
            "M4 competition, 414 hourly series without dates",
            (
                KnownFile(
                    "m4_hourly_train.csv",
                    f"{_M4}/Train/Hourly-train.csv",
                    "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
                ),
                KnownFile(
                    "m4_hourly_test.csv",
                    f"{_M4}/Test/Hourly-test.csv",
                    "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
                ),
            ),
            "Mcompetitions/M4-methods",
            "not stated",
            48,
            {"format": "m4", "freq": "h"},
        ),
        KnownDataset(
            "bike_sharing",
            "Hourly bicycle rentals in Washington with weather, 2011-2012",
            (
                KnownFile(
                    "bike_sharing.csv",
                    f"{_SKFORECAST}/bike_sharing_dataset_clean.csv",
                    "b2252681fd3f41eacbbd7242b1184e6aa364c4c01267db2b4b7d706aea184d36",
                ),
            ),
            "skforecast/skforecast-datasets",
            "BSD-3-Clause",
            24,
            {
                "format": "long",
                "timestamp": "date_time",
                "target": "users",
                "item_id": "",
                "feat_dynamic_real": ["holiday", "workingday", "temp", "hum", "windspeed"],
            },
        ),
        KnownDataset(
            "tourism_monthly",
            "366 monthly series of tourism",
            (KnownFile("tourism_monthly_monash.csv"),),
            "Monash archive, as CSV",
            "CC BY 4.0",
            24,
            {"format": "monash", "freq": "M"},
        ),
        KnownDataset(
            "hospital",
            "767 monthly counts of patients, 2000-2006",
            (KnownFile("hospital.csv"),),
            "Monash archive, as CSV",
            "CC BY 4.0",
            12,
            {"format": "monash", "freq": "M"},
        ),
        KnownDataset(
            "electricity_weekly",
            "Weekly electricity consumption of 321 clients, 2012-2014",
            (KnownFile("electricity_weekly.csv"),),
            "Monash archive, as CSV",
            "CC BY 4.0",
            8,
            {"format": "monash", "freq": "W-SUN"},
        ),
        KnownDataset(
            "walmart_weekly",
            "Weekly sales of 7 departments with covariates, 2010-2012",
            (KnownFile("walmart_sales_weekly.csv"),),
            "business-science/timetk, as CSV",
            "GPL-3",
            8,
            {
                "format": "long",
                "timestamp": "Date",
                "target": "Weekly_Sales",
                "item_id": "id",
                "feat_dynamic_real": list(_WALMART_COVARIATES),
            },
        ),
        KnownDataset(
            "co2",
            "Weekly CO2 at Mauna Loa with 59 missing weeks, 1958-2001",
            (
                KnownFile(
                    "co2.csv",
                    f"{_GITHUB}/statsmodels/statsmodels/v0.15.0/statsmodels/datasets/co2/co2.csv",
                    "16695fa2786e53414e5a6b54767a3fdf5de99cfbc68617f69d1362d92776a92f",
                ),
            ),
            "statsmodels 0.15.0",
            "public domain",
            26,
            {"format": "wide", "timestamp": "date"},
        ),
        KnownDataset(
            "air_passengers",
            "Monthly airline passengers, 1949-1960",
            (KnownFile("AirPassengers.csv"),),
            "Box & Jenkins, as CSV",
            "public domain",
            12,
            {"format": "wide", "timestamp": "Date"},
        ),
    )
}


def known_dataset(name: str) -> KnownDataset:
    """The data set of a name, whatever its case.

    Raises
    ------
    EvaluationError
        There is none.
    """
    names = {known.lower(): known for known in KNOWN_DATASETS}
    if name.lower() not in names:
        raise EvaluationError(
            f"no data set is known as {name!r}; {suggestion(name, list(KNOWN_DATASETS))}, or give "
            "a file with --data."
        )
    return KNOWN_DATASETS[names[name.lower()]]


def data_folders(data_dir: Optional[PathLike] = None) -> list[Path]:
    """Where known data sets are looked for, in order; downloads go to the first.

    `data_dir` if given; else the folders of the environment variable MOECAST_DATA, separated as in
    PATH, and `moecast/data` in the user's cache.
    """
    if data_dir is not None:
        return [Path(data_dir)]
    folders = [Path(text) for text in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if text]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [*folders, Path(cache) / "moecast" / "data"]


def find_files(known: KnownDataset, data_dir: Optional[PathLike] = None) -> Optional[list[Path]]:
    """The files of a data set in the first folder that has them all; None where none has."""
    for folder in data_folders(data_dir):
        paths = [folder / file.name for file in known.files]
        if all(path.is_file() for path in paths):
            return paths
    return None


def require_files(known: KnownDataset, data_dir: Optional[PathLike] = None) -> list[Path]:
    """As `find_files`.

    Raises
    ------
    EvaluationError
        The files are in none of the folders; the message names these.
    """
    paths = find_files(known, data_dir)
    if paths is None:
        names = " and ".join(file.name for file in known.files)
        folders = ", ".join(map(str, data_folders(data_dir)))
        remedy = (
            f"get it with `moecast datasets download {known.name}`"
            if all(file.url for file in known.files)
            else f"it is not published in this form ({known.source}), so put it there"
        )
        raise EvaluationError(
            f"{known.name}: {names} is not in {folders}; {remedy}, or name the folder with "
            f"--data-dir or {DATA_VARIABLE}."
        )
    return paths


def matches_published(path: Path, file: KnownFile) -> Optional[bool]:
    """Whether a file is the published one; None where its checksum is unknown."""
    if file.sha256 is None:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.sha256


def download(
    known: KnownDataset,
    data_dir: Optional[PathLike] = None,
    *,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[Path]:
    """Download a data set's files; each is checked before it gets its name.

    Parameters
    ----------
    known
        The data set.
    data_dir
        The folder; by default the first of `data_folders`.
    progress
        Called with a file's name and the number of bytes that have arrived.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    EvaluationError
        A file is not published in this form, cannot be reached or written, or has another checksum
        than the published one.
    """
    folder = data_folders(data_dir)[0]
    for file in known.files:
        if file.url is None:
            raise EvaluationError(
                f"{known.name}: {file.name} is not published in this form ({known.source}), so it "
                f"cannot be downloaded; convert it and put it into {folder}."
            )
    paths = []
    for file in known.files:
        path = folder / file.name
        if not (path.is_file() and matches_published(path, file)):
            _download_file(file, path, progress)
        paths.append(path)
    return paths


def _download_file(file: KnownFile, path: Path, progress: Callable[[str, int], None]) -> None:
    assert file.url is not None
    part = path.with_name(f"{path.name}.part")
    digest = hashlib.sha256()
    done = 0
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as written:
                while chunk := response.read(_CHUNK):
                    digest.update(chunk)
                    written.write(chunk)
                    done += len(chunk)
                    progress(file.name, done)
        if digest.hexdigest() != file.sha256:
            raise EvaluationError(
                f"{file.name}: what came from {file.url} has SHA-256 {digest.hexdigest()}, not the "
                f"published {file.sha256}; nothing was kept, so try again or get it elsewhere."
            )
        part.replace(path)
    except urllib.error.URLError as error:
        raise EvaluationError(
            f"{file.name}: {file.url} cannot be reached ({error.reason}), perhaps because there is "
            f"no network here; get it where there is one and put it into {path.parent}."
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"{file.name}: the download to {path} failed ({error}); nothing was kept."
        ) from error
    finally:
        part.unlink(missing_ok=True)
