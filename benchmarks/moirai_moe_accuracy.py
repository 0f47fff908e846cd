"""MOIRAI-MoE trained from scratch on several sets at once, forecast with, and fine-tuned.

    python benchmarks/moirai_moe_accuracy.py --data ../shared/data
    python benchmarks/moirai_moe_accuracy.py --data ../shared/data --accelerator gpu --jobs 6

For every seed, one network is trained on five sets without their test windows, each drawn from
equally often, and written in the published format. Read again for
each set's horizon, it forecasts the test windows of benchmarks/accuracy.py with both ways of
decoding. Then it is fine-tuned on tourism_monthly, which it has not seen, and compared with itself
before and with a network of the same size trained on tourism_monthly alone for as many steps.
With --more-series a mixture of other series is trained on as a sixth set, and made-up ones as a
seventh.
Printed are means over the seeds and their standard errors, as Markdown.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pandas as pd
import torch
from accuracy import METRICS, SETS, add_run_arguments, append_runs, be_quiet, start_pool, with_error
from gluonts.dataset import DataEntry
from gluonts.model import Predictor
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from machine import describe_machine
from moecast.evaluation import backtest, load_long_csv, load_wide
from moecast.forecasters import MoiraiMoEEstimator, MoiraiMoEPredictor

TOGETHER = ("ETTh1", "weather_h", "m4_hourly", "hospital", "electricity_weekly")
HOURLY = ("ETTh1", "weather_h", "m4_hourly")
FINE_TUNED_ON = "tourism_monthly"
DECODINGS = ("cached", "reencode")
CONTEXTS = {"ETTh1": 512, "weather_h": 512, "m4_hourly": 512, "electricity_weekly": 128}
CONTEXT = 96
COLUMNS = ("CRPS", "MASE", "MSIS", "in 80%")
STEPS_PER_EPOCH = 50
LONGEST_PIECE = 1024
HOURS_PER_STEP = (2, 3, 4, 6)
# Made-up series, and the lengths of their seasons, in steps.
SYNTHETIC = 600
SEASONS = (4, 7, 12, 12, 12, 24, 52)
# Steps of context and horizon in pretraining.
WINDOW = 512

TRAINING: Dict[str, Any] = {
    "distr_output": "student_t",
    "scaling": "regularised_std",
    "lr": 3e-3,
    "batch_size": 64,
    "num_batches_per_epoch": STEPS_PER_EPOCH,
}
PATCH_SIZES = [8, 16]
# The better of the two on tourism_monthly, from scratch as in fine-tuning.
TUNED_PATCH_SIZE = 8

Runs = Dict[Tuple[str, str, str], Dict[str, float]]
"""Values of each set, forecaster and way of decoding."""


def training_part(name: str, folder: Path) -> List[DataEntry]:
    """The series of a set without their test windows."""
    task = SETS[name]
    held_out = task.windows * task.prediction_length
    return [
        {"start": entry["start"], "target": entry["target"][:-held_out]}
        for entry in task.load(folder)
    ]


def other_series(folder: Path) -> List[List[DataEntry]]:
    """Groups of further series: hourly training parts averaged over hours, and other data."""
    averaged = [
        [
            averages(entry, hours)
            for hours in HOURS_PER_STEP
            for entry in training_part(name, folder)
        ]
        for name in HOURLY
    ]
    few = [
        *load_wide(folder / "co2.csv"),
        *load_wide(folder / "AirPassengers.csv", timestamp="Date"),
        *load_wide(folder / "bike_sharing.csv", timestamp="date_time", columns=["users"]),
        *load_long_csv(
            folder / "walmart_sales_weekly.csv",
            timestamp="Date",
            item_id="id",
            target="Weekly_Sales",
        ),
    ]
    return [*averaged, [{name: entry[name] for name in ("start", "target")} for entry in few]]


def synthetic_series() -> List[DataEntry]:
    """Made-up series of a growing or shrinking level, a season that goes with it, and noise."""
    random = np.random.default_rng(0)
    entries: List[DataEntry] = []
    for _ in range(SYNTHETIC):
        steps = np.arange(random.integers(120, 420))
        season = 0.4 * random.normal(size=random.choice(SEASONS))
        growth = random.normal(scale=0.004) * steps
        wandering = random.normal(scale=random.gamma(1, 0.02), size=len(steps)).cumsum()
        noise = random.normal(scale=random.gamma(1.5, 0.06), size=len(steps))
        logarithm = growth + wandering + noise + season[steps % len(season)]
        target = 10 ** random.uniform(0, 5) * np.exp(logarithm.clip(-6, 6))
        entries.append({"start": pd.Period("1980-01", freq="M"), "target": target})
    return entries


def averages(entry: DataEntry, hours: int) -> DataEntry:
    """An hourly series as means of so many hours, the last of them whole."""
    first = len(entry["target"]) % hours
    blocks = np.asarray(entry["target"])[first:].reshape(-1, hours)
    start = (entry["start"] + first).start_time
    return {"start": pd.Period(start, freq=f"{hours}h"), "target": blocks.mean(axis=1)}


def equally_often(sets: List[List[DataEntry]]) -> List[DataEntry]:
    """All series, those of small sets several times."""
    most = max(len(entries) for entries in sets)
    return [entry for entries in sets for entry in entries * round(most / len(entries))]


def in_pieces(entries: List[DataEntry]) -> List[DataEntry]:
    """Long series cut, so that repeating them takes no more memory than repeating short ones."""
    return [
        {
            "start": entry["start"] + first,
            "target": entry["target"][first : first + LONGEST_PIECE],
        }
        for entry in entries
        for first in range(0, len(entry["target"]), LONGEST_PIECE)
    ]


def trainer_kwargs(steps: int, arguments: argparse.Namespace) -> Dict[str, Any]:
    return {
        "accelerator": arguments.accelerator,
        "logger": False,
        "enable_progress_bar": False,
        "gradient_clip_val": 1.0,
        "max_epochs": steps // STEPS_PER_EPOCH,
    }


def score(
    set_name: str, predictor: Predictor, seed: int, arguments: argparse.Namespace
) -> Dict[str, float]:
    task = SETS[set_name]
    torch.manual_seed(seed)
    result = backtest(
        predictor,
        task.load(arguments.data),
        prediction_length=task.prediction_length,
        windows=task.windows,
        metrics=METRICS,
        seasonality=task.season_length,
    )
    return dict(zip(COLUMNS, result.metrics.values()))


def score_decodings(
    set_name: str,
    forecaster: str,
    folder: str,
    seconds: float,
    seed: int,
    arguments: argparse.Namespace,
    patch_size: Any = "auto",
) -> Runs:
    """Values of the network in a folder, for a set's horizon and with each way of decoding."""
    runs: Runs = {}
    for decoding in arguments.decodings:
        predictor = MoiraiMoEPredictor.from_pretrained(
            folder,
            prediction_length=SETS[set_name].prediction_length,
            context_length=CONTEXTS.get(set_name, CONTEXT),
            patch_size=patch_size,
            decoding=decoding,
        )
        values = score(set_name, predictor, seed, arguments)
        runs[set_name, forecaster, decoding] = {**values, "train s": seconds}
    return runs


def pretraining(seed: int, arguments: argparse.Namespace) -> MoiraiMoEEstimator:
    return MoiraiMoEEstimator(
        freq=None,
        prediction_length=arguments.horizon,
        context_length=WINDOW - arguments.horizon,
        seed=seed,
        patch_size=PATCH_SIZES,
        trainer_kwargs=trainer_kwargs(arguments.steps, arguments),
        dropout=arguments.dropout,
        **TRAINING,
    )


def pretrain_and_tune(seed: int, arguments: argparse.Namespace) -> Runs:
    """One network for all sets, before and after fine-tuning."""
    be_quiet()
    torch.set_num_threads(arguments.threads)
    sets = [training_part(name, arguments.data) for name in TOGETHER]
    if arguments.more_series:
        others = [in_pieces(entries) for entries in other_series(arguments.data)]
        sets = [in_pieces(entries) for entries in sets]
        sets += [equally_often(others), synthetic_series()]
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder:
        estimator = pretraining(seed, arguments)
        together = equally_often(sets)
        began = time.perf_counter()
        estimator.train(together).save_pretrained(folder)
        seconds = time.perf_counter() - began
        for name in (*TOGETHER, FINE_TUNED_ON):
            runs.update(score_decodings(name, "MOIRAI-MoE", folder, seconds, seed, arguments))
        runs.update(train_on_one("fine-tuned", seed, arguments, pretrained=folder))
    return runs


def train_from_scratch(seed: int, arguments: argparse.Namespace) -> Runs:
    """Networks of the same size trained on the set alone."""
    be_quiet()
    torch.set_num_threads(arguments.threads)
    return train_on_one("from scratch", seed, arguments)


def train_on_one(name: str, seed: int, arguments: argparse.Namespace, **own: Any) -> Runs:
    """A training of each number of steps on the set to fine-tune on."""
    task = SETS[FINE_TUNED_ON]
    entries = training_part(FINE_TUNED_ON, arguments.data)
    runs: Runs = {}
    for steps in arguments.tuning_steps:
        estimator = MoiraiMoEEstimator(
            freq=task.freq,
            prediction_length=task.prediction_length,
            context_length=CONTEXT,
            patch_size=TUNED_PATCH_SIZE,
            tune_routers=True,
            seed=seed,
            trainer_kwargs=trainer_kwargs(steps, arguments),
            **TRAINING,
            **own,
        )
        forecaster = f"MOIRAI-MoE, {name}, {steps} steps"
        began = time.perf_counter()
        predictor = estimator.train(entries)
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            predictor.save_pretrained(folder)
            tuned = score_decodings(
                FINE_TUNED_ON, forecaster, folder, seconds, seed, arguments, TUNED_PATCH_SIZE
            )
        runs.update(tuned)
    return runs


def naive(set_name: str) -> SeasonalNaivePredictor:
    task = SETS[set_name]
    return SeasonalNaivePredictor(
        prediction_length=task.prediction_length, season_length=task.season_length
    )


def print_accuracy(by_seed: List[Runs], arguments: argparse.Namespace) -> None:
    """A row for each set and forecaster, decoded in the first of the ways asked for."""
    print("| set | forecaster | " + " | ".join(COLUMNS) + " | train s |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    compared = set()
    for set_name, forecaster, decoding in by_seed[0]:
        if decoding != arguments.decodings[0]:
            continue
        if set_name not in compared:
            compared.add(set_name)
            cells = [f"{v:.4f}" for v in score(set_name, naive(set_name), 0, arguments).values()]
            print(f"| {set_name} | Seasonal Naive | " + " | ".join(cells) + " | |")
        runs = [runs_of_seed[set_name, forecaster, decoding] for runs_of_seed in by_seed]
        cells = [with_error([run[column] for run in runs]) for column in COLUMNS]
        cells.append(f"{np.mean([run['train s'] for run in runs]):.0f}")
        print(f"| {set_name} | {forecaster} | " + " | ".join(cells) + " |", flush=True)


def print_decodings(by_seed: List[Runs]) -> None:
    """The CRPS of both ways of decoding, and by how much the same network's differ."""
    print("\n| set | forecaster | " + " | ".join(DECODINGS) + " | difference |")
    print("|---" * (3 + len(DECODINGS)) + "|")
    for set_name, forecaster in dict.fromkeys(key[:2] for key in by_seed[0]):
        cached, reencode = (
            [runs[set_name, forecaster, decoding]["CRPS"] for runs in by_seed]
            for decoding in DECODINGS
        )
        differences = [theirs - ours for ours, theirs in zip(cached, reencode)]
        cells = [with_error(values) for values in (cached, reencode, differences)]
        print(f"| {set_name} | {forecaster} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="comma-separated")
    parser.add_argument(
        "--tuning-steps", type=numbers, default=[100, 300, 1000], help="comma-separated"
    )
    parser.add_argument("--horizon", type=int, default=64, help="of the windows of pretraining")
    parser.add_argument("--dropout", type=float, default=0.2, help="in pretraining alone")
    parser.add_argument("--more-series", action="store_true", help="train on other series, too")
    parser.add_argument("--decodings", type=names, default=list(DECODINGS), help="one or both")
    add_run_arguments(parser, steps=1500)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(arguments.threads)

    seeds = arguments.seeds
    network = pretraining(seeds[0], arguments).create_network()
    size = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{describe_machine()}; {size:,} parameters, {arguments.steps} steps, "
        f"seeds {', '.join(map(str, seeds))}\n",
        flush=True,
    )
    with start_pool(arguments.jobs) as pool:
        parts = [
            [pool.submit(train, seed, arguments) for seed in seeds]
            for train in (pretrain_and_tune, train_from_scratch)
        ]
        by_seed = [
            {**pretrained.result(), **scratch.result()} for pretrained, scratch in zip(*parts)
        ]
    for set_name, forecaster, decoding in by_seed[0]:
        runs = [runs_of_seed[set_name, forecaster, decoding] for runs_of_seed in by_seed]
        row = {"set": set_name, "forecaster": forecaster, "decoding": decoding}
        append_runs(arguments.out, seeds, runs, **row)
    print_accuracy(by_seed, arguments)
    if len(arguments.decodings) == len(DECODINGS):
        print_decodings(by_seed)


def names(text: str) -> List[str]:
    return text.split(",")


def numbers(text: str) -> List[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
