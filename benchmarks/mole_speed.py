"""MoLE with one DLinear expert against GluonTS's DLinear, in turn in one run, on ETTh1.

    python benchmarks/mole_speed.py --data ../shared/data

Both read 336 hours and forecast 96, in batches of 32. Printed are the median of the rounds and
the ratio of each pair of neighbouring runs. Training is timed from ``train`` to its return (data
preparation and checkpoints included); prediction until the last forecast is there, and once more
until its nine deciles are.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from gluonts.dataset.split import split
from gluonts.model import Estimator, Predictor
from gluonts.torch import DLinearEstimator
from machine import describe_machine, time_rounds
from moecast.evaluation import DECILES, load_wide
from moecast.forecasters import MoLEEstimator
from rich.console import Console
from rich.table import Table

CONTEXT, HORIZON, BATCH = 336, 96, 32


def make_estimators(steps: int) -> Dict[str, Estimator]:
    common: Dict[str, Any] = {
        "prediction_length": HORIZON,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "num_batches_per_epoch": 50,
    }
    quiet = {
        "max_epochs": steps // 50,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {
        "moecast": MoLEEstimator(
            freq="h", num_experts=1, expert="dlinear", trainer_kwargs=dict(quiet), **common
        ),
        "gluonts": DLinearEstimator(trainer_kwargs=dict(quiet), **common),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.csv")
    parser.add_argument("--steps", type=int, default=500, help="training steps per run")
    parser.add_argument("--windows", type=int, default=50, help="windows predicted per series")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the raw figures here as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "gluonts", "moecast"):
        logging.getLogger(name).setLevel(logging.ERROR)

    dataset = load_wide(arguments.data / "ETTh1.csv")
    training, template = split(dataset, offset=-HORIZON * arguments.windows)
    test = list(template.generate_instances(HORIZON, windows=arguments.windows).input)
    predictors: Dict[str, Predictor] = {}

    def train(name: str) -> Callable[[], float]:
        def run() -> float:
            torch.manual_seed(0)
            estimator = make_estimators(arguments.steps)[name]
            begin = time.perf_counter()
            predictors[name] = estimator.train(training)
            return arguments.steps * BATCH / (time.perf_counter() - begin)

        return run

    def predict(name: str, levels: List[float]) -> Callable[[], float]:
        def run() -> float:
            begin = time.perf_counter()
            for forecast in predictors[name].predict(test):
                for level in levels:
                    forecast.quantile(level)
            return len(test) / (time.perf_counter() - begin)

        return run

    names = ("moecast", "gluonts")
    results = {
        "training windows/s": time_rounds({n: train(n) for n in names}, arguments.rounds),
        "forecast series/s": time_rounds({n: predict(n, []) for n in names}, arguments.rounds),
        "forecast series/s, nine deciles read": time_rounds(
            {n: predict(n, list(DECILES)) for n in names}, arguments.rounds
        ),
    }
    console = Console()
    console.print(describe_machine())
    table = Table("", "moecast", "gluonts", "ratio (median)", "lowest", "highest")
    for label, rates in results.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["moecast"], rates["gluonts"])]
        cells = [f"{statistics.median(rates[name]):,.0f}" for name in names]
        shown = [statistics.median(ratios), min(ratios), max(ratios)]
        table.add_row(label, *cells, *(f"{ratio:.1f}×" for ratio in shown))
    console.print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": describe_machine(), **results}, indent=1))


if __name__ == "__main__":
    main()
