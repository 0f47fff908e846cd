"""The sample of the HTML report: three mixtures and two baselines on three data sets.

    python benchmarks/sample_report.py --data DATA

A few hundred steps each, so that the page can be made anew in minutes: it shows what the report
looks like, and is no measure of the models (that is docs/results.md).
"""

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import torch
from accuracy import BATCH, METRICS, SETS, STEPS_PER_EPOCH, TestSet, be_quiet, make_baseline
from gluonts.model import Estimator, Predictor
from moecast.evaluation import BacktestResult, backtest, results_table, write_html_report
from moecast.forecasters import (
    HierarchicalAutoformerEstimator,
    MoiraiMoEEstimator,
    MoLEEstimator,
)
from rich.console import Console

# Windows of ETTh1 begin 31 hours apart, and therefore at every hour and on every weekday.
TASKS: Dict[str, TestSet] = {
    "ETTh1": replace(SETS["ETTh1"], prediction_length=24, windows=48, context_length=168),
    "m4_hourly": replace(SETS["m4_hourly"], context_length=168),
    "tourism_monthly": SETS["tourism_monthly"],
}
DISTANCES = {"ETTh1": 31}
MODELS: Dict[str, Callable[..., Estimator]] = {
    "MoLE": partial(MoLEEstimator, patch_size="auto"),
    "Autoformer": HierarchicalAutoformerEstimator,
    "MOIRAI-MoE": partial(
        MoiraiMoEEstimator, num_layers=2, num_experts=8, patch_size=[8, 16], lr=3e-3
    ),
}
FORECASTERS = ("SeasonalNaive", "DLinear", *MODELS)


def make(name: str, task: TestSet, common: Dict[str, Any]) -> "Estimator | Predictor":
    if name in MODELS:
        return MODELS[name](freq=task.freq, seed=0, **common)
    return make_baseline(name, task, common)


def evaluate(set_name: str, name: str, arguments: argparse.Namespace) -> BacktestResult:
    task = TASKS[set_name]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (GluonTS's samplers draw from it)
    with tempfile.TemporaryDirectory() as root:
        common = {
            "prediction_length": task.prediction_length,
            "context_length": task.context_length,
            "batch_size": BATCH,
            "num_batches_per_epoch": STEPS_PER_EPOCH,
            "trainer_kwargs": {
                "max_epochs": max(1, arguments.steps // STEPS_PER_EPOCH),
                "accelerator": "cpu",
                "default_root_dir": root,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }
        return backtest(
            make(name, task, common),
            task.load(arguments.data),
            prediction_length=task.prediction_length,
            windows=task.windows,
            distance=DISTANCES.get(set_name),
            metrics=METRICS,
            seasonality=task.season_length,
            dataset_name=set_name,
            model=name,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--steps", type=int, default=200, help="gradient steps of each training")
    parser.add_argument("--sets", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--forecasters", default=",".join(FORECASTERS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("docs/sample_report.html"))
    arguments = parser.parse_args()
    be_quiet()
    # Models this small run fastest on one core.
    torch.set_num_threads(1)
    results = []
    for set_name in arguments.sets.split(","):
        for name in arguments.forecasters.split(","):
            result = evaluate(set_name, name, arguments)
            took = f"{result.train_seconds:.0f} s + {result.predict_seconds:.0f} s"
            print(f"{set_name}, {name}: {took}", flush=True)
            results.append(result)
    Console().print(results_table(results))
    # The folder's place on this machine is nobody's business.
    shown = ["DATA" if Path(text) == arguments.data else text for text in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/sample_report.py", *shown])
    title = "Sample report: three mixtures of experts and two baselines"
    note = (
        f"{arguments.steps} gradient steps each, one seed: a sample of the page, no measure of the "
        "models. The files of m4_hourly state no times; its hours and weekdays are counted from an "
        "arbitrary Monday."
    )
    file = write_html_report(results, arguments.out, command=command, title=title, note=note)
    print(f"{file}: {file.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
