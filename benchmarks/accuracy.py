"""Accuracy and coverage on real data, every forecaster with the same number of gradient steps.

    python benchmarks/accuracy.py --data ../shared/data                       # defaults, two seeds
    python benchmarks/accuracy.py --data ../shared/data --compare experts     # one and several
    python benchmarks/accuracy.py --data ../shared/data --compare calibration
    python benchmarks/accuracy.py --data ../shared/data --compare baselines

Six sets, 1,000 steps of 64 windows, the last windows of every series as test set. Printed are the
means over the seeds and their standard errors, as Markdown.
"""

import argparse
import json
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

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
    BacktestResult,
    IntervalCoverage,
    backtest,
    load_m4,
    load_monash,
    load_wide,
)
from moecast.forecasters import MoLEEstimator

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

ONE_EXPERT = {"num_experts": 1}
COMPARISONS: Dict[str, Dict[str, Mapping[str, Any]]] = {
    "default": {"MoLE": {}},
    "calibration": {"MoLE": {}, "MoLE, calibrated": {"calibration_windows": 4}},
    "experts": {
        f"{expert}, {label}": {"expert": expert, **settings}
        for expert in ("dlinear", "rlinear", "rmlp")
        for label, settings in (
            ("one expert", ONE_EXPERT),
            ("8, window router", {"router": "window"}),
            ("8, statistics router", {"router": "statistics"}),
            ("8, calendar router", {"router": "calendar"}),
        )
    },
    "routing": {
        "dense": {},
        "top 2": {"top_k": 2},
        "noisy top 2": {"top_k": 2, "noisy_routing": True},
        "head dropout 0.2": {"head_dropout": 0.2},
    },
    "patches": {"patch size 1": {}, "patch size auto": {"patch_size": "auto"}},
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


def evaluate(
    name: str, settings: Mapping[str, Any], set_name: str, data: Path, steps: int, seed: int
) -> BacktestResult:
    task = SETS[set_name]
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (GluonTS's samplers draw from it)
    common: Dict[str, Any] = {
        "prediction_length": task.prediction_length,
        "context_length": task.context_length,
        "batch_size": BATCH,
        "num_batches_per_epoch": STEPS_PER_EPOCH,
        "trainer_kwargs": {
            "max_epochs": steps // STEPS_PER_EPOCH,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    if name in (*BASELINES, "SeasonalNaive"):
        forecaster = make_baseline(name, task, common)
    else:
        forecaster = MoLEEstimator(freq=task.freq, **common, **settings)
    return backtest(
        forecaster,
        task.load(data),
        prediction_length=task.prediction_length,
        windows=task.windows,
        metrics=METRICS,
        seasonality=task.season_length,
        dataset_name=set_name,
        model=name,
    )


def with_error(values: Sequence[float]) -> str:
    """Mean and standard error."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.4f}"
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.4f} ± {error:.4f}"


def row_values(result: BacktestResult) -> Dict[str, float]:
    values = dict(zip(COLUMNS, result.metrics.values()))
    return {**values, "train s": result.train_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated")
    parser.add_argument("--compare", choices=[*COMPARISONS, "baselines"], default="default")
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write every run here as JSON lines")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "gluonts"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    if arguments.compare == "baselines":
        variants: Mapping[str, Mapping[str, Any]] = {n: {} for n in ("SeasonalNaive", *BASELINES)}
    else:
        variants = COMPARISONS[arguments.compare]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(f"{describe_machine()}; {arguments.steps} steps, seeds {arguments.seeds}\n")
    print("| set | forecaster | " + " | ".join(COLUMNS) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for set_name in arguments.sets.split(","):
        for name, settings in variants.items():
            runs = []
            for seed in seeds:
                result = evaluate(name, settings, set_name, arguments.data, arguments.steps, seed)
                runs.append(row_values(result))
                if arguments.out:
                    line = {"set": set_name, "forecaster": name, "seed": seed, **runs[-1]}
                    with arguments.out.open("a") as out:
                        out.write(json.dumps(line) + "\n")
            cells = [with_error([run[column] for run in runs]) for column in COLUMNS[:-1]]
            cells.append(f"{np.mean([run['train s'] for run in runs]):.1f}")
            print(f"| {set_name} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
