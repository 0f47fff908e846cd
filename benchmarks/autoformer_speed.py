"""The Autoformer against NeuralForecast's, in turn in one run, and what its parts cost.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/autoformer_speed.py
    python benchmarks/autoformer_speed.py --compare parts      # needs no NeuralForecast
    python benchmarks/autoformer_speed.py --compare context

All have the same number of features, heads, layers, delays and lengths, and four time features;
*plain* has no patches, no wavelets and no experts, and decomposes every layer, as theirs does.
A training step is the loss of a batch of random windows, its gradient and Adam's step; ours is
the likelihood of Student's t, theirs the mean absolute error. A prediction is the network's output
for the same batch. Printed are medians over the rounds, and the median of the ratios of
neighbouring runs. Memory is what the process had resident at most during a training step, above
the most it had before.
"""

import argparse
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Callable, Dict, List, Mapping, Tuple

import torch
from machine import describe_machine, time_rounds
from moecast.forecasters import HierarchicalAutoformerEstimator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

PLAIN: Dict[str, Any] = {
    "patch_size": 1,
    "num_experts": 1,
    "wavelet": None,
    "decomposition": "layers",
    "dropout": 0.05,
}
PARTS: Dict[str, Mapping[str, Any]] = {
    "plain": {},
    "decomposition of the input only": {"decomposition": "input"},
    "4 experts": {"num_experts": 4},
    "wavelets, 2 levels": {"wavelet": "db4", "wavelet_levels": 2},
    "patches of 4": {"patch_size": 4},
    "as by default": {"decomposition": "input", "num_experts": 4, "patch_size": 4},
}
CONTEXTS = (96, 192, 384, 768, 1536)
NUM_TIME_FEATURES = 4

Step = Callable[[], float]


def timed(work: Callable[[], None]) -> Step:
    """Seconds that the work takes."""

    def run() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return run


def training_and_prediction(
    network: nn.Module, loss: Callable[[], Tensor], predict: Callable[[], Any]
) -> Tuple[Step, Step]:
    optimizer = torch.optim.Adam(network.parameters())

    def train() -> None:
        network.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def forecast() -> None:
        network.eval()
        with torch.inference_mode():
            predict()

    return timed(train), timed(forecast)


def ours(settings: Mapping[str, Any], arguments: argparse.Namespace) -> Tuple[Step, Step]:
    torch.manual_seed(0)
    network = HierarchicalAutoformerEstimator(
        freq="h",
        prediction_length=arguments.horizon,
        context_length=arguments.context,
        d_model=arguments.features,
        d_ff=arguments.hidden_features,
        num_heads=arguments.heads,
        **{**PLAIN, **settings},
    ).create_network()
    shapes = network.describe_inputs(arguments.batch).shapes
    batch = {name: torch.randn(shape) for name, shape in shapes.items()}
    batch["past_observed_values"] = torch.ones(shapes["past_observed_values"])
    future = {
        "future_target": torch.randn(arguments.batch, arguments.horizon, 1),
        "future_observed_values": torch.ones(arguments.batch, arguments.horizon, 1),
    }
    patch_size = network.patch_sizes[0]
    return training_and_prediction(
        network,
        lambda: network.window_losses({**batch, **future}, patch_size)[0].mean(),
        lambda: network.outputs(batch),
    )


def neuralforecasts(arguments: argparse.Namespace) -> Tuple[Step, Step]:
    try:
        from neuralforecast.models import Autoformer
    except ImportError as error:
        raise SystemExit(
            f"{error}: run `python -m pip install -r benchmarks/requirements.txt`, or "
            "choose --compare parts"
        ) from error
    torch.manual_seed(0)
    network = Autoformer(
        h=arguments.horizon,
        input_size=arguments.context,
        hidden_size=arguments.features,
        conv_hidden_size=arguments.hidden_features,
        n_head=arguments.heads,
        encoder_layers=2,
        decoder_layers=1,
        factor=1,
        dropout=0.05,
        futr_exog_list=[f"time {i}" for i in range(NUM_TIME_FEATURES)],
    )
    both = arguments.context + arguments.horizon
    batch = {
        "insample_y": torch.randn(arguments.batch, arguments.context, 1),
        "insample_mask": torch.ones(arguments.batch, arguments.context, 1),
        "futr_exog": torch.randn(arguments.batch, both, NUM_TIME_FEATURES),
        "hist_exog": None,
        "stat_exog": None,
    }
    target = torch.randn(arguments.batch, arguments.horizon, 1)
    return training_and_prediction(
        network, lambda: (network(batch) - target).abs().mean(), lambda: network(batch)
    )


def compare(
    programs: Dict[str, Tuple[Step, Step]], reference: str, arguments: argparse.Namespace
) -> Table:
    """Milliseconds of each program, and how they relate to the reference's."""
    title = f"context {arguments.context}, horizon {arguments.horizon}, batch {arguments.batch}"
    table = Table(title=title)
    table.add_column("")
    results = [
        time_rounds({name: steps[which] for name, steps in programs.items()}, arguments.rounds)
        for which in (0, 1)
    ]
    for column in ("training step, ms", "ratio", "prediction, ms", "ratio"):
        table.add_column(column, justify="right")
    for name in programs:
        cells: List[str] = []
        for seconds in results:
            ratios = [theirs / its for theirs, its in zip(seconds[reference], seconds[name])]
            cells += [
                f"{1e3 * statistics.median(seconds[name]):,.0f}",
                f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})",
            ]
        table.add_row(name, *cells)
    return table


def time_and_memory(
    settings: Mapping[str, Any], arguments: argparse.Namespace
) -> Tuple[float, float]:
    """Median seconds and peak megabytes of a training step, in a process of its own."""
    torch.set_num_threads(arguments.threads)
    train, _ = ours(settings, arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [train() for _ in range(arguments.rounds + 1)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(seconds[1:]), (after - before) / 1024


def contexts(arguments: argparse.Namespace) -> Table:
    table = Table(title=f"a training step, horizon {arguments.horizon}, batch {arguments.batch}")
    table.add_column("context", justify="right")
    variants = {name: PARTS[name] for name in ("plain", "as by default")}
    for name in variants:
        for column in ("ms", "µs per step", "MB"):
            table.add_column(f"{name}, {column}", justify="right")
    for context in CONTEXTS:
        cells = []
        for settings in variants.values():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                given = argparse.Namespace(**{**vars(arguments), "context": context})
                seconds, megabytes = pool.submit(time_and_memory, settings, given).result()
            per_step = seconds / (arguments.batch * (context + arguments.horizon))
            cells += [f"{1e3 * seconds:,.0f}", f"{1e6 * per_step:.1f}", f"{megabytes:,.0f}"]
        table.add_row(str(context), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    choices = ("neuralforecast", "parts", "context")
    parser.add_argument("--compare", choices=choices, default="neuralforecast")
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--hidden-features", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=100)
    console.print(describe_machine())
    if arguments.compare == "context":
        console.print(contexts(arguments))
        return
    if arguments.compare == "neuralforecast":
        reference = "NeuralForecast"
        programs = {reference: neuralforecasts(arguments)}
        for name in ("plain", "patches of 4", "as by default"):
            programs[f"moecast, {name}"] = ours(PARTS[name], arguments)
    else:
        reference = "plain"
        programs = {name: ours(settings, arguments) for name, settings in PARTS.items()}
    console.print(compare(programs, reference, arguments))


if __name__ == "__main__":
    main()
