"""Results in the files that the GIFT-Eval leaderboard takes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Iterable, Literal, Union

import pandas as pd

from .backtest import BacktestResult
from .errors import EvaluationError
from .metrics import GIFT_EVAL_METRICS
from .tables import PathLike

METRIC_NAMES = tuple(metric(axis=None).name for metric in GIFT_EVAL_METRICS)
COLUMNS = (
    "dataset",
    "model",
    *(f"eval_metrics/{name}" for name in METRIC_NAMES),
    "domain",
    "num_variates",
)

# GIFT-Eval names frequencies as pandas before 2.2 did.
_OLD_ALIASES = {"h": "H", "min": "T", "s": "S", "ME": "M", "QE": "Q", "YE": "A", "Y": "A"}


def config_name(name: str, freq: str, term: str = "short") -> str:
    """GIFT-Eval's name of a data set configuration: `"ett1/15T/long"` for freq `"15min"`."""
    offset = pd.Period("2000-01-03", freq=freq).freq
    base = offset.name.split("-")[0]
    alias = _OLD_ALIASES.get(base, base)
    return f"{name}/{offset.n if offset.n > 1 else ''}{alias}/{term}"


def write_gift_eval(
    results: Union[BacktestResult, Iterable[BacktestResult]],
    folder: PathLike,
    *,
    term: Literal["short", "medium", "long"] = "short",
    domain: str = "",
    model_type: Literal["statistical", "deep-learning", "pretrained"] = "deep-learning",
    model_dtype: str = "float32",
    **config: str,
) -> list[Path]:
    """Write `all_results.csv` and `config.json` as GIFT-Eval's leaderboard takes them.

    Parameters
    ----------
    results
        One result, or several. GIFT-Eval has a folder per model: results of several models go to
        subfolders named by them.
    folder
        Made if it does not exist; files of these names in it are replaced.
    term, domain
        Term and domain of the data sets (GIFT-Eval's domains: Econ/Fin, Energy, Healthcare,
        Nature, Sales, Transport, Web/CloudOps).
    model_type, model_dtype
        What kind of model it is, and its number format.
    **config
        Further fields of `config.json`, such as `model_link`, `code_link`, `org`,
        `testdata_leakage` and `replication_code_available`.

    Returns
    -------
    list of Path
        The folders written to.

    Raises
    ------
    EvaluationError
        There is no result, or one lacks a metric of GIFT-Eval.
    """
    if isinstance(results, BacktestResult):
        results = [results]
    by_model: dict[str, list[BacktestResult]] = {}
    for result in results:
        missing = [name for name in METRIC_NAMES if name not in result.metrics]
        if missing:
            raise EvaluationError(
                f"{result.model} on {result.dataset}: GIFT-Eval needs the metric {missing[0]!r}; "
                "backtest with metrics=GIFT_EVAL_METRICS."
            )
        by_model.setdefault(result.model, []).append(result)
    if not by_model:
        raise EvaluationError("there is no result to write; run a backtest first.")

    folders = []
    for model, own in by_model.items():
        target = Path(folder) if len(by_model) == 1 else Path(folder) / model
        target.mkdir(parents=True, exist_ok=True)
        with (target / "all_results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_row(result, term, domain) for result in own)
        description = {
            "model": model,
            "model_type": model_type,
            "model_dtype": model_dtype,
            **config,
        }
        text = json.dumps(description, indent=4, ensure_ascii=False)
        (target / "config.json").write_text(text + "\n", encoding="utf-8")
        folders.append(target)
    return folders


def _row(result: BacktestResult, term: str, domain: str) -> list[Union[str, float, int]]:
    return [
        config_name(result.dataset, result.freq, term),
        result.model,
        *(result.metrics[name] for name in METRIC_NAMES),
        domain,
        result.num_variates,
    ]
