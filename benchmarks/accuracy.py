"""Accuracy and coverage on real data, every forecaster with the same number of gradient steps.

    python benchmarks/accuracy.py --data ../shared/data                       # defaults, two seeds
    python benchmarks/accuracy.py --data ../shared/data --compare experts     # one and several
    python benchmarks/accuracy.py --data ../shared/data --compare calibration
    python benchmarks/accuracy.py --data ../shared/data --compare baselines
    python benchmarks/accuracy.py --data ../shared/data --jobs 8 --accelerator gpu

Six sets, 1,000 steps of 64 windows, the last windows of every series as test set. Printed are the
means over the seeds and their standard errors, as Markdown.
"""

import argparse
import json
import logging
import math
import tempfile
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import gluonts.torch as gluonts_torch
import numpy as np
import torch
from gluonts.dataset import DataEntry
from gluonts.model import Estimator, Predictor
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from machine import describe_machine
from moecast.evaluation import (
    CRPS,
    MASE,
    MSIS,
    IntervalCoverage,
    backtest,
    load_m4,
    load_monash,
    load_wide,
)
from moecast.forecasters import HierarchicalAutoformerEstimator, MoLEEstimator

METRICS = (CRPS, MASE(), MSIS(), IntervalCoverage(0.8))
COLUMNS = ("CRPS", "MASE", "MSIS", "in 80%", "train s")
STEPS_PER_EPOCH, BATCH = 50, 64


@dataclass(frozen=True)
class TestSet:
    """A data set and the task set on it."""

    load: Callable[[Path], List[DataEntry]]
    freq: str
    prediction_length: int
    windows: int
    context_length: int
    season_length: int


def load_hourly_weather(folder: Path) -> List[DataEntry]:
    """Every sixth of the ten-minute values, as they stand in the file."""
    entries = load_wide(folder / "weather.csv", irregular="keep")
    return [
        {**entry, "start": entry["start"].asfreq("h"), "target": entry["target"][::6]}
        for entry in entries
    ]


SETS: Dict[str, TestSet] = {
    "ETTh1": TestSet(lambda d: load_wide(d / "ETTh1.csv"), "h", 96, 8, 336, 24),
    "weather_h": TestSet(load_hourly_weather, "h", 96, 4, 336, 24),
    "m4_hourly": TestSet(
        lambda d: load_m4(d / "m4_hourly_train.csv", d / "m4_hourly_test.csv", freq="h"),
        "h",
        48,
        1,
        336,
        24,
    ),
    "tourism_monthly": TestSet(
        lambda d: load_monash(d / "tourism_monthly_monash.csv", freq="M"), "M", 24, 1, 48, 12
    ),
    "hospital": TestSet(lambda d: load_monash(d / "hospital.csv", freq="M"), "M", 12, 1, 48, 12),
    "electricity_weekly": TestSet(
        lambda d: load_monash(d / "electricity_weekly.csv", freq="W-SUN"), "W-SUN", 8, 1, 64, 52
    ),
}

MoLE, Autoformer = MoLEEstimator, HierarchicalAutoformerEstimator
COMPARISONS: Dict[str, Dict[str, Callable[..., Estimator]]] = {
    "default": {"MoLE": MoLE, "Autoformer": Autoformer},
    "calibration": {"MoLE": MoLE, "MoLE, calibrated": partial(MoLE, calibration_windows=4)},
    "experts": {
        f"{expert}, {label}": partial(MoLE, expert=expert, **settings)
        for expert in ("dlinear", "rlinear", "rmlp")
        for label, settings in (
            ("one expert", {"num_experts": 1}),
            ("8, window router", {"router": "window"}),
            ("8, statistics router", {"router": "statistics"}),
            ("8, calendar router", {"router": "calendar"}),
        )
    },
    "routing": {
        "dense": MoLE,
        "top 2": partial(MoLE, top_k=2),
        "noisy top 2": partial(MoLE, top_k=2, noisy_routing=True),
        "head dropout 0.2": partial(MoLE, head_dropout=0.2),
    },
    "patches": {
        "patch size 1": MoLE,
        "patch size auto": partial(MoLE, patch_size="auto"),
    },
    "autoformer": {
        "Autoformer": Autoformer,
        "Autoformer, wavelets": partial(Autoformer, wavelet="db4"),
        "Autoformer, layers decomposed": partial(Autoformer, decomposition="layers"),
        "Autoformer, no decomposition": partial(Autoformer, decomposition=None),
        "Autoformer, one expert": partial(Autoformer, num_experts=1),
        "Autoformer, patch size 8": partial(Autoformer, patch_size=8),
    },
    "autoformer patches": {
        "Autoformer, patch size 1": partial(Autoformer, patch_size=1),
        "Autoformer, patch size auto": partial(Autoformer, patch_size="auto"),
    },
}
BASELINES: Dict[str, Dict[str, Any]] = {
    "DLinear": {"hidden_dimension": 64},
    "SimpleFeedForward": {"hidden_dimensions": [128, 128]},
    "PatchTST": {
        "patch_len": 16,
        "d_model": 64,
        "nhead": 4,
        "dim_feedforward": 128,
        "num_encoder_layers": 2,
    },
}


def make_baseline(name: str, task: TestSet, common: Dict[str, Any]) -> "Estimator | Predictor":
    if name == "SeasonalNaive":
        return SeasonalNaivePredictor(
            prediction_length=task.prediction_length, season_length=task.season_length
        )
    settings = dict(BASELINES[name])
    if settings.get("patch_len", 0) > task.context_length // 2:
        settings["patch_len"] = task.context_length // 4
    return getattr(gluonts_torch, f"{name}Estimator")(**settings, **common)


def be_quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "gluonts"):
        logging.getLogger(name).setLevel(logging.ERROR)


def evaluate(
    compare: str, set_name: str, name: str, seed: int, arguments: argparse.Namespace
) -> Dict[str, float]:
    """Train and backtest one forecaster; the values of its row."""
    # GluonTS's estimators would all write to one folder below the current one.
    with tempfile.TemporaryDirectory() as root:
        return evaluate_in(root, compare, set_name, name, seed, arguments)


def evaluate_in(
    root: str,
    compare: str,
    set_name: str,
    name: str,
    seed: int,
    arguments: argparse.Namespace,
) -> Dict[str, float]:
    be_quiet()
    torch.set_num_threads(arguments.threads)
    task = SETS[set_name]
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (GluonTS's samplers draw from it)
    common: Dict[str, Any] = {
        "prediction_length": task.prediction_length,
        "context_length": task.context_length,
        "batch_size": BATCH,
        "num_batches_per_epoch": STEPS_PER_EPOCH,
        "trainer_kwargs": {
            "max_epochs": arguments.steps // STEPS_PER_EPOCH,
            "accelerator": arguments.accelerator,
            "default_root_dir": root,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    if compare == "baselines":
        forecaster = make_baseline(name, task, common)
    else:
        forecaster = COMPARISONS[compare][name](freq=task.freq, **common)
    result = backtest(
        forecaster,
        task.load(arguments.data),
        prediction_length=task.prediction_length,
        windows=task.windows,
        metrics=METRICS,
        seasonality=task.season_length,
        dataset_name=set_name,
        model=name,
    )
    return {**dict(zip(COLUMNS, result.metrics.values())), "train s": result.train_seconds}


def with_error(values: Sequence[float]) -> str:
    """Mean and standard error."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.4f}"
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated")
    parser.add_argument("--compare", choices=[*COMPARISONS, "baselines"], default="default")
    parser.add_argument("--forecasters", nargs="*", help="some of the comparison's")
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    add_run_arguments(parser)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(arguments.threads)

    compare = arguments.compare
    names = ["SeasonalNaive", *BASELINES] if compare == "baselines" else list(COMPARISONS[compare])
    if arguments.forecasters:
        unknown = set(arguments.forecasters) - set(names)
        if unknown:
            parser.error(f"--compare {compare} has no {', '.join(sorted(unknown))}: choose {names}")
        names = arguments.forecasters
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = [(set_name, name) for set_name in arguments.sets.split(",") for name in names]
    print(f"{describe_machine()}; {arguments.steps} steps, seeds {arguments.seeds}\n")
    print("| set | forecaster | " + " | ".join(COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|", flush=True)
    with start_pool(arguments.jobs) as pool:
        pending = {
            row: [pool.submit(evaluate, compare, *row, seed, arguments) for seed in seeds]
            for row in rows
        }
        for (set_name, name), futures in pending.items():
            runs = [future.result() for future in futures]
            append_runs(arguments.out, seeds, runs, set=set_name, forecaster=name)
            cells = [with_error([run[column] for run in runs]) for column in COLUMNS[:-1]]
            cells.append(f"{np.mean([run['train s'] for run in runs]):.1f}")
            print(f"| {set_name} | {name} | " + " | ".join(cells) + " |", flush=True)


def add_run_arguments(parser: argparse.ArgumentParser, steps: int = 1000) -> None:
    """How to run, for all benchmarks of accuracy."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--accelerator", default="cpu", help="as Lightning names it")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--out", type=Path, help="write every run here as JSON lines")


def append_runs(
    path: Optional[Path], seeds: Sequence[int], runs: Sequence[Dict[str, float]], **row: str
) -> None:
    """Append a row's runs to a file of JSON lines, if there is to be one."""
    if path is None:
        return
    with path.open("a") as out:
        for seed, run in zip(seeds, runs):
            out.write(json.dumps({**row, "seed": seed, **run}) + "\n")


def start_pool(jobs: int) -> Executor:
    """Processes; with one job a thread, so that nothing is started and errors are plain."""
    if jobs == 1:
        return ThreadPoolExecutor(max_workers=1)
    return ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn"))


if __name__ == "__main__":
    main()
