"""MOIRAI-MoE against uni2ts's, in turn in one run, on the same random weights and random walks.

    python benchmarks/moirai_moe_speed.py
    python benchmarks/moirai_moe_speed.py --device cuda --shape base --series 8,32 --uni2ts-rounds 3

Each program loads the same checkpoint in a process of its own and is timed from ``predict`` to
its last forecast, on a GPU after once that does not count. Printed are the median of its rounds
and its memory, weights included: on a CPU the most that its process had resident while it loaded
the checkpoint, and since; on a GPU the most that torch allocated and reserved since.

Floating-point operations are those of :func:`count_operations`. Their rate is compared with that
of float32 matrix products measured in the same run: one as wide as an expert's first, and a large
one.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
import pandas as pd
import torch
from gluonts.model import Predictor
from machine import describe_machine
from rich.console import Console
from rich.table import Table

# moecast and uni2ts are imported where they are used: the memory measured is of one of them only.


class Shape(NamedTuple):
    """What the published sizes differ in."""

    d_model: int
    d_ff: int
    num_layers: int


SHAPES = {"small": Shape(384, 512, 6), "base": Shape(768, 1024, 12)}
HEAD_FEATURES, MAX_SEQ_LEN, NUM_EXPERTS, TOP_K = 64, 512, 32, 2
# Weights of the mixture; Student's t, normal of fixed scale, negative binomial, log-normal.
NUM_HEAD_PARAMETERS = 4 + 3 + 1 + 2 + 2
MODES = ("cached", "reencode")
PRODUCT_ROWS, LARGE, SECONDS_PER_PRODUCT = 1600, 4096, 2.0
# Linux forgets the peak of a process's memory when 5 is written here.
RESET_PEAK = Path("/proc/self/clear_refs")


def count_operations(program: str, arguments: argparse.Namespace, series: int) -> float:
    """Floating-point operations of a forecast: two for each weight that a token meets.

    A token meets the embedding; in each layer four square projections, the centroids and its
    chosen experts of three matrices each; and, where the next patch is wanted, the head. Attention
    adds two products with every key, masked ones included.
    """
    width, d_ff, num_layers = SHAPES[arguments.shape]
    patch_size, samples = arguments.patch_size, arguments.samples
    context = -(-arguments.context // patch_size)
    future = -(-arguments.horizon // patch_size)
    embedding = 2 * patch_size * width + width**2
    experts = NUM_EXPERTS * width + TOP_K * 3 * width * d_ff
    head = NUM_HEAD_PARAMETERS * patch_size * width

    def layer(keys: int) -> int:
        return 4 * width**2 + 2 * keys * width + experts

    def encode(tokens: int) -> int:
        """Ours: behind the last layer's keys and values, only the last token goes on."""
        last = tokens * 3 * width**2 + layer(tokens) - 3 * width**2
        return tokens * (embedding + (num_layers - 1) * layer(tokens)) + last + head

    steps = range(1, future)
    if program == "uni2ts":
        tokens = context + future
        everything = tokens * (embedding + num_layers * layer(tokens) + head)
        per_series = everything * (1 + samples * len(steps))
    elif program == "reencode":
        per_series = encode(context) + samples * sum(encode(context + step) for step in steps)
    else:
        step_by_step = [embedding + num_layers * layer(context + step) + head for step in steps]
        per_series = encode(context) + samples * sum(step_by_step)
    return 2.0 * series * per_series


def write_checkpoint(arguments: argparse.Namespace, folder: str) -> None:
    from moecast.distributions import (
        LogNormalOutput,
        MixtureOutput,
        NegativeBinomialOutput,
        NormalFixedScaleOutput,
        StudentTOutput,
    )
    from moecast.forecasters.fields import WindowConfig
    from moecast.forecasters.moirai_moe import (
        MoiraiMoEConfig,
        MoiraiMoENetwork,
        MoiraiMoEPredictor,
    )

    head = MixtureOutput(
        [
            StudentTOutput(),
            NormalFixedScaleOutput(),
            NegativeBinomialOutput(real_valued=True),
            LogNormalOutput(),
        ]
    )
    shape = SHAPES[arguments.shape]
    config = MoiraiMoEConfig(
        window=WindowConfig(None, arguments.horizon, arguments.context),
        distr_output=head,
        scaling="regularised_std",
        patch_sizes=(arguments.patch_size,),
        num_heads=shape.d_model // HEAD_FEATURES,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        max_seq_len=MAX_SEQ_LEN,
        **shape._asdict(),
    )
    torch.manual_seed(arguments.seed)
    MoiraiMoEPredictor(MoiraiMoENetwork(config), device="cpu").save_pretrained(folder)


def our_predictor(
    arguments: argparse.Namespace, folder: str, batch_size: int, mode: str
) -> Predictor:
    from moecast.forecasters.moirai_moe import MoiraiMoEPredictor

    return MoiraiMoEPredictor.from_pretrained(
        folder,
        arguments.horizon,
        arguments.context,
        num_samples=arguments.samples,
        decoding=mode,
        batch_size=batch_size,
        device=arguments.device,
    )


def uni2ts_predictor(arguments: argparse.Namespace, folder: str, batch_size: int) -> Predictor:
    from uni2ts.model.moirai_moe import MoiraiMoEForecast, MoiraiMoEModule

    forecast = MoiraiMoEForecast(
        prediction_length=arguments.horizon,
        target_dim=1,
        feat_dynamic_real_dim=0,
        past_feat_dynamic_real_dim=0,
        context_length=arguments.context,
        module=MoiraiMoEModule.from_pretrained(folder),
        patch_size=arguments.patch_size,
        num_samples=arguments.samples,
    )
    return forecast.create_predictor(batch_size=batch_size, device=arguments.device)


def random_walks(arguments: argparse.Namespace, series: int) -> List[Dict[str, Any]]:
    steps = np.random.default_rng(arguments.seed).normal(size=(series, arguments.context))
    start = pd.Period("2020-01-01 00:00", freq="h")
    return [{"start": start, "target": walk} for walk in steps.cumsum(axis=1).astype(np.float32)]


def time_program(
    program: str, arguments: argparse.Namespace, folder: str, series: int
) -> Dict[str, Any]:
    """Seconds of each round, and two kinds of memory in bytes."""
    batch_size = arguments.batch_size or series
    if program == "uni2ts":
        predictor = uni2ts_predictor(arguments, folder, batch_size)
    else:
        predictor = our_predictor(arguments, folder, batch_size, program)
    dataset = random_walks(arguments, series)
    on_gpu = arguments.device == "cuda"
    loading = peak_memory()
    RESET_PEAK.write_text("5")

    def run() -> float:
        torch.manual_seed(arguments.seed)
        begin = time.perf_counter()
        number = sum(1 for _ in predictor.predict(dataset))
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        assert number == series, f"{number} forecasts of {series} series"
        return seconds

    if on_gpu:
        run()
        torch.cuda.reset_peak_memory_stats()
    rounds = arguments.uni2ts_rounds if program == "uni2ts" else arguments.rounds
    seconds = [run() for _ in range(rounds)]
    if on_gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"seconds": seconds, "memory": {"allocated": allocated, "reserved": reserved}}
    return {"seconds": seconds, "memory": {"loading": loading, "predicting": peak_memory()}}


def peak_memory() -> int:
    """The most bytes that this process has had resident since its peak was reset."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_rates(arguments: argparse.Namespace) -> Dict[str, float]:
    """Operations per second, the best of many runs, of two matrix products."""
    width, d_ff, _ = SHAPES[arguments.shape]
    rates = {}
    for rows, inner, columns in ((PRODUCT_ROWS, width, 2 * d_ff), (LARGE, LARGE, LARGE)):
        left = torch.rand(rows, inner, device=arguments.device)
        right = torch.rand(inner, columns, device=arguments.device)
        operations = 2 * rows * inner * columns
        repeats = 100 if arguments.device == "cuda" else 1
        best, begin = 0.0, time.perf_counter()
        while time.perf_counter() - begin < SECONDS_PER_PRODUCT:
            since = time.perf_counter()
            for _ in range(repeats):
                left @ right
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, repeats * operations / (time.perf_counter() - since))
        rates[f"{rows}×{inner}×{columns}"] = best
    return rates


def run_task(task: str, arguments: argparse.Namespace, folder: str, series: int) -> Any:
    """What one process is for."""
    if task == "checkpoint":
        return write_checkpoint(arguments, folder)
    if task == "rates":
        return measure_rates(arguments)
    return time_program(task, arguments, folder, series)


def run_in_process(task: str, folder: str, series: int = 0) -> Any:
    """The same of a new process of this script, with the same options."""
    command = [sys.executable, *sys.argv, "--task", task, folder, str(series)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{task} failed:\n{finished.stderr[-4000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def make_table(
    arguments: argparse.Namespace,
    series: int,
    results: Dict[str, Dict[str, Any]],
    rates: Dict[str, float],
) -> Table:
    """A column for each program."""
    seconds = {name: statistics.median(result["seconds"]) for name, result in results.items()}
    theirs: Optional[float] = seconds.get("uni2ts")
    speed = {name: result["operations"] / seconds[name] for name, result in results.items()}
    table = Table(f"{arguments.shape}, {series} series", *results)
    table.add_row("seconds", *(f"{value:.3g}" for value in seconds.values()))
    table.add_row("series/s", *(f"{series / value:.3g}" for value in seconds.values()))
    if theirs:
        table.add_row("times as fast", *(f"{theirs / value:.1f}×" for value in seconds.values()))
    for kind in next(iter(results.values()))["memory"]:
        memory = [result["memory"][kind] for result in results.values()]
        table.add_row(f"memory {kind}, MiB", *(f"{value / 2**20:,.0f}" for value in memory))
    operations = [result["operations"] for result in results.values()]
    table.add_row("GFLOP", *(f"{value / 1e9:,.1f}" for value in operations))
    table.add_row("GFLOP/s", *(f"{value / 1e9:,.1f}" for value in speed.values()))
    for product, rate in rates.items():
        table.add_row(
            f"of {rate / 1e9:,.0f} in {product}",
            *(f"{value / rate:.0%}" for value in speed.values()),
        )
    return table


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> List[int]:
        return [int(part) for part in text.split(",")]

    def modes(text: str) -> List[str]:
        names = text.split(",")
        if set(names) - set(MODES):
            raise argparse.ArgumentTypeError(f"{text!r} must name some of {', '.join(MODES)}")
        return names

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--series", type=numbers, default=[8], help="how many, or several: 8,32")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, help="all series by default")
    parser.add_argument("--modes", type=modes, default=list(MODES), help=",".join(MODES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all cores by default")
    parser.add_argument("--tf32", action="store_true", help="for matrix products, on CUDA")
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    parser.add_argument("--uni2ts-rounds", type=int, default=1)
    parser.add_argument("--skip-uni2ts", action="store_true", help="time ours alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the raw figures here as JSON")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    if arguments.task:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        task, folder, series = arguments.task
        print()
        print(json.dumps(run_task(task, arguments, folder, int(series))))
        return

    console = Console()
    machine = describe_machine()
    console.print(machine)
    programs = [*arguments.modes, *([] if arguments.skip_uni2ts else ["uni2ts"])]
    measured: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rates = run_in_process("rates", folder)
        run_in_process("checkpoint", folder)
        for series in arguments.series:
            results = measured[str(series)] = {}
            for program in programs:
                results[program] = run_in_process(program, folder, series)
                results[program]["operations"] = count_operations(program, arguments, series)
            console.print(make_table(arguments, series, results, rates))
            if arguments.out:
                raw = {"machine": machine, "command": sys.argv, "rates": rates, "series": measured}
                arguments.out.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
