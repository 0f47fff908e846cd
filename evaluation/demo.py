"""The demonstration: ``python -m moecast.evaluation.demo``.

Trains MoLE on two real data sets that come inside packages, backtests it over several windows
against Seasonal Naive and GluonTS's DLinear, prints a table and draws the forecasts.
"""

import contextlib
import importlib
import io
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import typer
from gluonts.dataset import DataEntry
from gluonts.model import Estimator, Predictor
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from gluonts.torch import DLinearEstimator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..forecasters import MoLEEstimator
from .backtest import BacktestResult, backtest
from .errors import EvaluationError
from .metrics import CRPS, MASE, MSIS, IntervalCoverage
from .plots import plot_forecasts, require_matplotlib
from .report import results_table, write_results

METRICS = (CRPS, MASE(), MSIS(), IntervalCoverage(0.8))
EPOCHS, BATCHES_PER_EPOCH, CALIBRATION_WINDOWS = 10, 50, 8


@dataclass(frozen=True)
class DemoSet:
    """A data set of the demonstration and the task set on it."""

    name: str
    title: str
    load: Callable[[], List[DataEntry]]
    season_length: int
    prediction_length: int
    context_length: int
    windows: int


def load_taylor() -> List[DataEntry]:
    """Half-hourly electricity demand in England and Wales, 12 weeks of 2000 (Taylor 2003)."""
    datasets = _import("pmdarima.datasets")
    target = np.asarray(datasets.load_taylor(), dtype=np.float32)
    start = pd.Period("2000-06-05 00:00", freq="30min")
    return [{"item_id": "demand", "start": start, "target": target}]


def load_co2() -> List[DataEntry]:
    """Weekly CO2 at Mauna Loa, 1958 to 2001, with its 59 missing weeks (Keeling & Whorf 2004)."""
    datasets = _import("statsmodels.datasets")
    series = datasets.co2.load_pandas().data["co2"]
    start = pd.Period(series.index[0], freq="W-SAT")
    return [{"item_id": "co2", "start": start, "target": series.to_numpy(np.float32)}]


DEMO_SETS = (
    DemoSet("taylor", "Electricity demand, half-hourly", load_taylor, 336, 48, 336, 14),
    DemoSet("co2", "CO2 at Mauna Loa, weekly with gaps", load_co2, 52, 26, 156, 8),
)


class EpochProgress(pl.Callback):
    """Moves a progress bar on at the end of each epoch."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.advance()


def make_forecasters(
    demo_set: DemoSet, freq: str, trainer_kwargs: Callable[[], Dict[str, Any]]
) -> Dict[str, Callable[[], "Estimator | Predictor"]]:
    """The forecasters compared; both estimators take the same number of gradient steps.

    DLinear and Seasonal Naive are GluonTS's own, with their defaults. MoLE is trained once more to
    calibrate its intervals.
    """
    common: Dict[str, Any] = {
        "prediction_length": demo_set.prediction_length,
        "context_length": demo_set.context_length,
        "num_batches_per_epoch": BATCHES_PER_EPOCH,
    }
    return {
        "SeasonalNaive": lambda: SeasonalNaivePredictor(
            prediction_length=demo_set.prediction_length, season_length=demo_set.season_length
        ),
        "DLinear": lambda: DLinearEstimator(trainer_kwargs=trainer_kwargs(), **common),
        "MoLE": lambda: MoLEEstimator(
            freq=freq,
            calibration_windows=CALIBRATION_WINDOWS,
            seed=0,
            trainer_kwargs=trainer_kwargs(),
            **common,
        ),
    }


def evaluate(demo_set: DemoSet, console: Console) -> List[BacktestResult]:
    """Train and backtest every forecaster on one set, with a line and a bar for each."""
    dataset = demo_set.load()
    freq = dataset[0]["start"].freqstr
    missing = int(np.isnan(dataset[0]["target"]).sum())
    console.print(
        f"\n[bold]{demo_set.title}[/bold]: {len(dataset[0]['target']):,} steps, {missing} missing; "
        f"{demo_set.windows} windows of {demo_set.prediction_length} steps are forecast"
    )
    results = []
    with (
        tempfile.TemporaryDirectory() as checkpoints,
        Progress(
            TextColumn("  {task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):

        def trainer_kwargs() -> Dict[str, Any]:
            return {
                "default_root_dir": checkpoints,
                "max_epochs": EPOCHS,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [EpochProgress(lambda: progress.advance(task))],
            }

        for name, make in make_forecasters(demo_set, freq, trainer_kwargs).items():
            forecaster = make()
            is_trained = isinstance(forecaster, Estimator)
            calibrates = getattr(forecaster, "calibration_windows", 0) > 0
            epochs = EPOCHS * (2 if calibrates else 1) if is_trained else 1
            task = progress.add_task(name, total=epochs)
            torch.manual_seed(0)
            # GluonTS's evaluation draws a bar of its own.
            with contextlib.redirect_stderr(io.StringIO()):
                result = backtest(
                    forecaster,
                    dataset,
                    prediction_length=demo_set.prediction_length,
                    windows=demo_set.windows,
                    metrics=METRICS,
                    seasonality=demo_set.season_length,
                    keep_forecasts=True,
                    dataset_name=demo_set.name,
                    model=name,
                )
            results.append(result)
            progress.update(task, completed=epochs)
    return results


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(
            f"the demonstration's series come with {module.partition('.')[0]}, which is not "
            "installed: pip install 'moecast[demo]'"
        ) from error


def _quiet() -> None:
    # Models this small run fastest on one core, and leave the other to the user.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "gluonts"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(out: Path = Path("demo_output")) -> None:
    """Train MoLE on real series, backtest it against baselines, and plot its forecasts."""
    require_matplotlib()
    _quiet()
    console = Console()
    began = time.perf_counter()
    results: List[BacktestResult] = []
    figures: List[Tuple[str, Path]] = []
    out.mkdir(parents=True, exist_ok=True)
    for demo_set in DEMO_SETS:
        evaluated = evaluate(demo_set, console)
        results.extend(evaluated)
        path = out / f"{demo_set.name}.png"
        plot_forecasts(
            {result.model: list(result.forecasts or ()) for result in evaluated[1:]},
            evaluated[0].test_data,
            history_length=2 * demo_set.prediction_length,
            max_windows=3,
            title=demo_set.title,
            path=path,
        )
        figures.append((demo_set.title, path))
    console.print()
    console.print(results_table(results))
    console.print(
        "CRPS, MASE and MSIS: smaller is better. 'in 80%' is the share of values within the 80% "
        "interval.\nSeasonalNaive and DLinear are GluonTS's. Both estimators took "
        f"{EPOCHS * BATCHES_PER_EPOCH} gradient steps; MoLE took as many once more before, without "
        "the last windows, to calibrate its intervals."
    )
    table = out / "results.csv"
    write_results(results, table)
    for title, path in figures:
        console.print(f"Plot of {title}: [bold]{path.resolve()}[/bold]")
    console.print(f"Table: [bold]{table.resolve()}[/bold]")
    console.print(f"Done in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    try:
        typer.run(main)
    except EvaluationError as error:
        raise SystemExit(f"error: {error}") from None
