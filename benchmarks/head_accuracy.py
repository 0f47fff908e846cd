"""Heads compared at equal steps on real data: counts, intermittent counts, sums over a horizon.

    python benchmarks/head_accuracy.py --data ../shared/data                       # all three
    python benchmarks/head_accuracy.py --data ../shared/data --set intermittent --jobs 2

MoLE with its defaults, 1,000 steps of 64 windows, the last windows of every series as test set.
Printed are the means over the seeds and their standard errors, as Markdown.

hospital      hospital.csv: 767 monthly counts without zeros, the last year of each as test set.
intermittent  Rain of weather.csv every ten minutes, in the tenths of a millimetre in which the
              gauge counts it, nothing else done to it: one series of 52,704 counts, of which 96%
              are zeros and the largest is 112. The last fifth is the test set, 1,756 windows of an
              hour, from twelve hours of context each; a forecast of zeros has a CRPS of 1.
copula        ETTh1.csv: the sum and the maximum over the 96 hours of each of 8 windows, read from
              500 paths, with independent steps and with steps joined by a Gaussian copula. Their
              CRPS is that of the samples, without the bias of their finite number, divided by the
              mean absolute sum or maximum; the CRPS is that of the single hours.

CRPS is the mean weighted quantile loss over the deciles; intervals are central, ends included, so
that those of counts hold more than their nominal share.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

import numpy as np
import torch
from accuracy import (
    BATCH,
    SETS,
    STEPS_PER_EPOCH,
    TestSet,
    add_run_arguments,
    append_runs,
    be_quiet,
    start_pool,
    with_error,
)
from gluonts.dataset import DataEntry
from machine import describe_machine
from moecast.evaluation import CRPS, BacktestResult, IntervalCoverage, backtest, load_wide
from moecast.forecasters import MoLEEstimator

LEVELS = (0.5, 0.8, 0.95)
METRICS = (CRPS, *(IntervalCoverage(level) for level in LEVELS))
METRIC_COLUMNS = ("CRPS", *(f"in {level:.0%}" for level in LEVELS))
NUM_SAMPLES, PATH_LEVEL = 500, 0.8
TENTHS = 10
OVER_THE_HORIZON: Dict[str, Callable[..., np.ndarray]] = {"sum": np.sum, "maximum": np.max}

COUNT_HEADS = (
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "student_t",
    "mixture(student_t, negative_binomial)",
    "mixture(poisson, negative_binomial)",
    "quantile_spline",
)
PATH_HEADS = ("student_t", "gaussian_copula(student_t)")


def load_rain(folder: Path) -> List[DataEntry]:
    """Rain in ten minutes, in tenths of a millimetre; rows that the file lacks are missing."""
    (rain,) = load_wide(folder / "weather.csv", columns=["rain (mm)"])
    return [{**rain, "target": np.round(rain["target"] * TENTHS)}]


@dataclass(frozen=True)
class Comparison:
    """Heads compared on one set, and what is read from their forecasts."""

    task: TestSet
    heads: Sequence[str]
    reads_paths: bool = False

    @property
    def columns(self) -> Sequence[str]:
        if not self.reads_paths:
            return METRIC_COLUMNS
        paths = [
            column
            for name in OVER_THE_HORIZON
            for column in (f"CRPS of the {name}", f"{name} in {PATH_LEVEL:.0%}")
        ]
        return (*METRIC_COLUMNS, *paths)


COMPARISONS: Mapping[str, Comparison] = {
    "hospital": Comparison(SETS["hospital"], COUNT_HEADS),
    "intermittent": Comparison(TestSet(load_rain, "10min", 6, 1756, 72, 144), COUNT_HEADS),
    "copula": Comparison(SETS["ETTh1"], PATH_HEADS, reads_paths=True),
}


def sample_crps(samples: np.ndarray, label: float) -> float:
    """Fair sample CRPS: ``E|X - label| - E|X - X'| / 2`` over distinct pairs (Ferro 2014)."""
    ordered = np.sort(samples)
    number = len(ordered)
    signs = 2 * np.arange(1, number + 1) - number - 1
    half_difference = (signs * ordered).sum() / (number * (number - 1))
    return float(np.abs(ordered - label).mean() - half_difference)


def score_paths(result: BacktestResult) -> Dict[str, float]:
    """CRPS and coverage of what the horizon comes to, from sample paths."""
    assert result.forecasts is not None
    tails = (1 - PATH_LEVEL) / 2, (1 + PATH_LEVEL) / 2
    scores: Dict[str, List[float]] = {name: [] for name in OVER_THE_HORIZON}
    inside: Dict[str, List[bool]] = {name: [] for name in OVER_THE_HORIZON}
    sizes: Dict[str, List[float]] = {name: [] for name in OVER_THE_HORIZON}
    for forecast, label in zip(result.forecasts, result.test_data.label):
        paths = forecast.to_sample_forecast(NUM_SAMPLES).samples.astype(np.float64)
        for name, reduce in OVER_THE_HORIZON.items():
            values, truth = reduce(paths, axis=1), float(reduce(label["target"].astype(np.float64)))
            low, high = np.quantile(values, tails)
            scores[name].append(sample_crps(values, truth))
            inside[name].append(bool(low <= truth <= high))
            sizes[name].append(abs(truth))
    scored: Dict[str, float] = {}
    for name in OVER_THE_HORIZON:
        scored[f"CRPS of the {name}"] = float(np.mean(scores[name]) / np.mean(sizes[name]))
        scored[f"{name} in {PATH_LEVEL:.0%}"] = float(np.mean(inside[name]))
    return scored


def evaluate(
    set_name: str, head: str, seed: int, arguments: argparse.Namespace
) -> Dict[str, float]:
    """Train and backtest MoLE with one head; the values of its row."""
    be_quiet()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (GluonTS's samplers draw from it)
    comparison = COMPARISONS[set_name]
    task = comparison.task
    with tempfile.TemporaryDirectory() as root:
        trainer: Dict[str, Any] = {
            "max_epochs": arguments.steps // STEPS_PER_EPOCH,
            "accelerator": arguments.accelerator,
            "default_root_dir": root,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        estimator = MoLEEstimator(
            freq=task.freq,
            prediction_length=task.prediction_length,
            context_length=task.context_length,
            distr_output=head,
            batch_size=BATCH,
            num_batches_per_epoch=STEPS_PER_EPOCH,
            trainer_kwargs=trainer,
        )
        result = backtest(
            estimator,
            task.load(arguments.data),
            prediction_length=task.prediction_length,
            windows=task.windows,
            metrics=METRICS,
            seasonality=task.season_length,
            keep_forecasts=comparison.reads_paths,
            dataset_name=set_name,
            model=head,
        )
    row = dict(zip(METRIC_COLUMNS, result.metrics.values()))
    if comparison.reads_paths:
        row.update(score_paths(result))
    return {**row, "train s": result.train_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--set", choices=[*COMPARISONS, "all"], default="all")
    parser.add_argument("--heads", nargs="+", help="only these, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    add_run_arguments(parser)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(arguments.threads)

    def heads_of(name: str) -> Sequence[str]:
        return arguments.heads or COMPARISONS[name].heads

    names = list(COMPARISONS) if arguments.set == "all" else [arguments.set]
    seeds = ",".join(map(str, arguments.seeds))
    print(f"{describe_machine()}; {arguments.steps} steps, seeds {seeds}", flush=True)
    with start_pool(arguments.jobs) as pool:
        pending = {
            (name, head): [
                pool.submit(evaluate, name, head, seed, arguments) for seed in arguments.seeds
            ]
            for name in names
            for head in heads_of(name)
        }
        for name in names:
            columns = COMPARISONS[name].columns
            print(f"\n| {name} | " + " | ".join(columns) + " | train s |")
            print("|---" * (2 + len(columns)) + "|", flush=True)
            for head in heads_of(name):
                runs = [future.result() for future in pending[name, head]]
                append_runs(arguments.out, arguments.seeds, runs, set=name, head=head)
                cells = [with_error([run[column] for run in runs]) for column in columns]
                cells.append(f"{np.mean([run['train s'] for run in runs]):.1f}")
                print(f"| {head} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
