"""MOIRAI-MoE trained from scratch on several sets at once, forecast with, and fine-tuned.

    python benchmarks/moirai_moe_accuracy.py --data ../shared/data

One network is trained on the series of five sets without their test windows, each set drawn from
equally often, and written in the published format. Read again for each set's horizon, it forecasts
the test windows of benchmarks/accuracy.py with both ways of decoding. Then it is fine-tuned on
tourism_monthly, which it has not seen, and compared with itself before and with a network of the
same size trained on tourism_monthly alone for the same time. Printed as Markdown, a row as soon as
it is known.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from accuracy import METRICS, SETS, add_run_arguments, append_runs, be_quiet
from gluonts.dataset import DataEntry
from gluonts.model import Predictor
from gluonts.model.seasonal_naive import SeasonalNaivePredictor
from machine import describe_machine
from moecast.evaluation import backtest
from moecast.forecasters import MoiraiMoEEstimator, MoiraiMoEPredictor

TOGETHER = ("ETTh1", "weather_h", "m4_hourly", "hospital", "electricity_weekly")
FINE_TUNED_ON = "tourism_monthly"
CONTEXTS = {"ETTh1": 512, "weather_h": 512, "m4_hourly": 512, "electricity_weekly": 128}
CONTEXT = 96
COLUMNS = ("CRPS", "MASE", "MSIS", "in 80%")
STEPS_PER_EPOCH, BATCH, SAMPLES = 50, 64, 100

NETWORK: Dict[str, Any] = {
    "prediction_length": 64,
    "context_length": 448,
    "patch_size": [8, 16],
    "distr_output": "student_t",
    "scaling": "regularised_std",
}


def training_part(name: str, folder: Path) -> List[DataEntry]:
    """The series of a set without their test windows."""
    task = SETS[name]
    held_out = task.windows * task.prediction_length
    return [
        {"start": entry["start"], "target": entry["target"][:-held_out]}
        for entry in task.load(folder)
    ]


def equally_often(sets: List[List[DataEntry]]) -> List[DataEntry]:
    """All series, those of small sets several times."""
    most = max(len(entries) for entries in sets)
    return [entry for entries in sets for entry in entries * round(most / len(entries))]


def trainer_kwargs(arguments: argparse.Namespace, **limit: Any) -> Dict[str, Any]:
    return {
        "accelerator": arguments.accelerator,
        "logger": False,
        "enable_progress_bar": False,
        **limit,
    }


def score(name: str, predictor: Predictor, arguments: argparse.Namespace) -> Dict[str, float]:
    task = SETS[name]
    torch.manual_seed(arguments.seed)
    result = backtest(
        predictor,
        task.load(arguments.data),
        prediction_length=task.prediction_length,
        windows=task.windows,
        metrics=METRICS,
        seasonality=task.season_length,
    )
    return dict(zip(COLUMNS, result.metrics.values()))


def report(
    set_name: str,
    forecaster: str,
    predictor: Predictor,
    arguments: argparse.Namespace,
    seconds: Optional[float] = None,
) -> None:
    row = score(set_name, predictor, arguments)
    append_runs(arguments.out, [arguments.seed], [row], set=set_name, forecaster=forecaster)
    cells = [f"{value:.4f}" for value in row.values()]
    cells.append("" if seconds is None else f"{seconds:.0f}")
    print(f"| {set_name} | {forecaster} | " + " | ".join(cells) + " |", flush=True)


def read(folder: str, set_name: str, decoding: str = "cached") -> MoiraiMoEPredictor:
    """The network in a folder, for a set's horizon."""
    return MoiraiMoEPredictor.from_pretrained(
        folder,
        prediction_length=SETS[set_name].prediction_length,
        context_length=CONTEXTS.get(set_name, CONTEXT),
        num_samples=SAMPLES,
        decoding=decoding,
    )


def naive(set_name: str) -> SeasonalNaivePredictor:
    task = SETS[set_name]
    return SeasonalNaivePredictor(
        prediction_length=task.prediction_length, season_length=task.season_length
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the CSV files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=2.0, help="of fine-tuning")
    add_run_arguments(parser, steps=2000)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(arguments.threads)

    together = equally_often([training_part(name, arguments.data) for name in TOGETHER])
    estimator = MoiraiMoEEstimator(
        freq=None,
        batch_size=BATCH,
        num_batches_per_epoch=STEPS_PER_EPOCH,
        seed=arguments.seed,
        trainer_kwargs=trainer_kwargs(arguments, max_epochs=arguments.steps // STEPS_PER_EPOCH),
        **NETWORK,
    )
    size = sum(parameter.numel() for parameter in estimator.create_network().parameters())
    print(f"{describe_machine()}; {size:,} parameters, {arguments.steps} steps\n")
    print("| set | forecaster | " + " | ".join(COLUMNS) + " | train s |")
    print("|---" * (3 + len(COLUMNS)) + "|", flush=True)
    began = time.perf_counter()
    predictor = estimator.train(together)
    trained = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        predictor.save_pretrained(folder)
        for set_name in (*TOGETHER, FINE_TUNED_ON):
            report(set_name, "Seasonal Naive", naive(set_name), arguments)
            for decoding in ("cached", "reencode"):
                loaded = read(folder, set_name, decoding)
                report(set_name, f"MOIRAI-MoE, {decoding}", loaded, arguments, trained)
        fine_tune(folder, arguments)


def fine_tune(folder: str, arguments: argparse.Namespace) -> None:
    """Fine-tune, and train anew, for the same time."""
    task = SETS[FINE_TUNED_ON]
    entries = training_part(FINE_TUNED_ON, arguments.data)
    common: Dict[str, Any] = {
        "freq": task.freq,
        "prediction_length": task.prediction_length,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "num_batches_per_epoch": STEPS_PER_EPOCH,
        "seed": arguments.seed,
        "num_samples": SAMPLES,
        "trainer_kwargs": trainer_kwargs(arguments, max_time={"minutes": arguments.minutes}),
    }
    started = {"patch_size": NETWORK["patch_size"], "lr_schedule": "constant"}
    for name, settings in (
        ("MOIRAI-MoE, from scratch", {"distr_output": NETWORK["distr_output"]}),
        ("MOIRAI-MoE, fine-tuned", {"pretrained": folder, "lr": 3e-4}),
    ):
        began = time.perf_counter()
        predictor = MoiraiMoEEstimator(**common, **started, **settings).train(entries)
        report(FINE_TUNED_ON, name, predictor, arguments, time.perf_counter() - began)


if __name__ == "__main__":
    main()
