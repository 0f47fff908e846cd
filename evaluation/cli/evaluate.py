"""`moecast evaluate MODEL_DIR…`: saved models and baselines over the same windows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, List, Optional

import pandas as pd
import typer

from ..backtest import BacktestResult, backtest, gift_eval_windows, season_length
from ..datasets import Entry
from ..errors import EvaluationError
from ..report import results_frame, results_table
from ..specs import dimensions
from .backtests import Forecasters, Settings, seed_all, session
from .console import check_table_path, command, command_line, say, show, write_table
from .model_folder import SavedModel, load_model
from .sources import DataOptions, Source, read_source

_MAX_WINDOWS = 20


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "evaluate")
    def evaluate_command(
        data: DataOptions,
        model_dirs: Annotated[
            Optional[List[Path]],
            typer.Argument(help="Folders that `moecast train` wrote.", metavar="MODEL_DIR…"),
        ] = None,
        forecaster: Forecasters = [],  # noqa: B006  typer copies it
        set_: Settings = None,
        prediction_length: Annotated[
            Optional[int],
            typer.Option(help="Steps to forecast, where no MODEL_DIR says."),
        ] = None,
        windows: Annotated[
            Optional[int],
            typer.Option(
                "--windows",
                min=1,
                help="Test windows at the end of each series; by default those that no MODEL_DIR "
                "was trained on, at most 20, or GIFT-Eval's rule without one.",
            ),
        ] = None,
        distance: Annotated[
            Optional[int],
            typer.Option(
                "--distance", min=1, help="Steps between windows; by default the horizon."
            ),
        ] = None,
        seasonality: Annotated[
            Optional[int],
            typer.Option(min=1, help="Steps per season; by default from the frequency."),
        ] = None,
        batch_size: Annotated[int, typer.Option(min=1, help="Windows scored at a time.")] = 512,
        seed: Annotated[int, typer.Option(help="Seed of NumPy's and torch's numbers.")] = 0,
        out: Annotated[
            Optional[Path],
            typer.Option("--out", help="File for all metrics: .csv, .json, .jsonl or .parquet."),
        ] = None,
        report: Annotated[
            Optional[Path], typer.Option("--report", help="Folder for a report as a HTML page.")
        ] = None,
    ) -> None:
        """Score saved models, and forecasters trained here, on the last windows of each series.

        A saved model is not trained again. Windows that it was trained on flatter it: train with
        --holdout, or evaluate on a file that has grown since. Where that is not so, a note and the
        column trained_on_windows say it. A --forecaster is trained on what precedes the windows.
        """
        if out is not None:
            check_table_path(out)
        models = [load_model(folder) for folder in model_dirs or []]
        horizon = _horizon(models, prediction_length)
        if not models and not forecaster:
            raise EvaluationError("give a MODEL_DIR, or a --forecaster such as seasonal-naive.")
        # Models whose data are read alike share them.
        read: dict[str, Source] = {}
        for model in models:
            key = repr(model.reading)
            if key not in read:
                read[key] = read_source(data, model.reading)
        sources = [read[repr(model.reading)] for model in models] or [read_source(data)]
        if horizon is None:
            horizon = sources[0].prediction_length
        if horizon is None:
            raise EvaluationError(
                "--prediction-length is missing: the number of steps to forecast."
            )
        for model, source in zip(models, sources):
            model.check(source.entries, source.name, forecast=False)
        entries = [without_future(source.entries) for source in sources]
        step = horizon if distance is None else distance
        if windows is None:
            unseen = [_unseen_windows(m, e, horizon, step) for m, e in zip(models, entries)]
            windows = max(1, min(unseen)) if unseen else gift_eval_windows(entries[0], horizon)
        reach = horizon + (windows - 1) * step
        seen = {model.name: _has_seen(model, e, reach) for model, e in zip(models, entries)}
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise EvaluationError(f"two model folders are named {name!r}; rename one.")

        with session(forecaster, set_) as (specs, trainer_kwargs):
            start = entries[0][0]["start"]
            season = season_length(start) if seasonality is None else seasonality
            common: dict[str, Any] = {
                "prediction_length": horizon,
                "windows": windows,
                "distance": step,
                "seasonality": season,
                "batch_size": batch_size,
                "dataset_name": sources[0].name,
            }
            results: List[BacktestResult] = []
            for model, series in zip(models, entries):
                say(f"{model.name}, {windows} windows of {horizon} steps …")
                seed_all(seed)
                result = backtest(model.predictor, series, model=model.name, **common)
                seconds = 0.0 if model.record is None else model.record.training.get("seconds", 0.0)
                results.append(dataclasses.replace(result, train_seconds=seconds))
            for spec in specs:
                if spec.name in names:
                    raise EvaluationError(
                        f"a model folder is named {spec.name!r} as a forecaster is; name that "
                        f"one, as in --forecaster other={spec.name}."
                    )
                say(f"{spec.name}, {windows} windows of {horizon} steps …")
                seed_all(seed)
                built = spec.build(
                    freq=start.freqstr,
                    prediction_length=horizon,
                    season_length=season,
                    trainer_kwargs=trainer_kwargs,
                    **dimensions(entries[0]),
                )
                results.append(backtest(built, entries[0], model=spec.name, **common))
        show(results_table(results))
        for name, what in seen.items():
            if what:
                say(f"note: {name} {what}")
        if out is not None:
            write_table(_all_metrics(results, windows, seen), out)
            say(f"wrote {out}")
        if report is not None:
            say(f"wrote {_write_report(results, report)}")


def _horizon(models: List[SavedModel], asked: Optional[int]) -> Optional[int]:
    horizons = {model.name: model.window.prediction_length for model in models}
    if asked is not None:
        horizons["--prediction-length"] = asked
    if len(set(horizons.values())) > 1:
        listed = ", ".join(f"{name}: {steps}" for name, steps in horizons.items())
        raise EvaluationError(
            f"the horizons differ ({listed}); compare models of one horizon at a time."
        )
    return next(iter(horizons.values()), None)


def without_future(entries: List[Entry]) -> List[Entry]:
    """Entries whose covariates end with the target, so that both are split alike."""
    return [
        {**entry, "feat_dynamic_real": entry["feat_dynamic_real"][:, : entry["target"].shape[-1]]}
        if "feat_dynamic_real" in entry
        else entry
        for entry in entries
    ]


def _steps_since_training(model: SavedModel, entry: Entry) -> Optional[int]:
    """Steps of a series behind the last that was trained on; None if it was not trained on."""
    until = model.trained_until(entry)
    if until is None:
        return None
    return (
        int(entry["target"].shape[-1])
        - int((until - entry["start"]).n // entry["start"].freq.n)
        - 1
    )


def _unseen_windows(model: SavedModel, entries: List[Entry], horizon: int, step: int) -> int:
    since = [_steps_since_training(model, entry) for entry in entries]
    known = [steps for steps in since if steps is not None]
    if not known:
        return gift_eval_windows(entries, horizon)
    return min(_MAX_WINDOWS, (min(known) - horizon) // step + 1)


def _has_seen(model: SavedModel, entries: List[Entry], reach: int) -> str:
    """What is to be said about a model and the windows that it was trained on; empty if nothing."""
    if model.record is None:
        return "has no record of what it was trained on, perhaps on these windows"
    since = [_steps_since_training(model, entry) for entry in entries]
    seen = sum(steps is not None and steps < reach for steps in since)
    if not seen:
        return ""
    return (
        f"was trained on steps of these windows in {seen} of {len(entries)} series, so its scores "
        "are not those of a forecast; train with --holdout, or evaluate on later data"
    )


def _all_metrics(results: List[BacktestResult], windows: int, seen: dict[str, str]) -> pd.DataFrame:
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    frame = results_frame(results, metrics)
    frame.insert(3, "windows", windows)
    frame.insert(4, "trained_on_windows", [bool(seen.get(result.model)) for result in results])
    return frame


def _write_report(results: List[BacktestResult], folder: Path) -> Path:
    from ..html_report import write_html_report

    return write_html_report(results, folder, command=command_line())
