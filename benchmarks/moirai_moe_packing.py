r"""Training steps of MOIRAI-MoE with short windows in rows of their own, and several in one row.

    OMP_NUM_THREADS=1 python benchmarks/moirai_moe_packing.py --data ../shared/data
    OMP_NUM_THREADS=1 python benchmarks/moirai_moe_packing.py --shares
    OMP_NUM_THREADS=1 python benchmarks/moirai_moe_packing.py --shape small --batches 2 --rounds 3 \
        --only "walks as all three"
    python benchmarks/moirai_moe_packing.py --device cuda --shape small

Windows of context 512 are drawn as in training from series of the lengths of hospital,
tourism_monthly and m4_hourly without their test windows, as random walks and, with --data, the
series themselves: each set alone, and all three together, each drawn from equally often. With
--shares, instead, windows of 84 steps stand among full ones in growing shares, to find from which
saving on packing pays.

Tokens are those that the layers compute in a step: padding, too, without packing, and empty slots
with it. Both ways take turns on the same batches, forward and backward with the balance loss,
without the optimiser. Printed are medians over all steps, as Markdown, and the median and range of
the rounds' ratios.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from accuracy import be_quiet
from gluonts.dataset import DataEntry
from machine import describe_machine, time_rounds
from moecast.forecasters import MoiraiMoEEstimator
from moecast.forecasters.moe import Routing, total_balance_loss
from moecast.forecasters.moirai_moe import MoiraiMoENetwork, packing
from moirai_moe_accuracy import equally_often, training_part
from torch import Tensor

SETS = ("hospital", "tourism_monthly", "m4_hourly")
CONTEXT, HORIZON = 512, 24
# As many steps as a series needs for a full window; and what a short window has.
LONG, SHORT = CONTEXT + HORIZON, 84
SHAPES: Dict[str, Dict[str, Any]] = {
    "default": {},
    "small": {"d_model": 384, "d_ff": 512, "num_layers": 6, "num_heads": 6, "num_experts": 32},
}
# The largest share of the patches that the rows may have: none, and any.
WAYS = {"unpacked": 0.0, "packed": 1.0}
Batch = Dict[str, Tensor]


class Steps(NamedTuple):
    """Of each batch, the tokens of a layer, those of them that are no padding, and seconds."""

    tokens: List[int]
    counted: List[int]
    seconds: List[float]


def random_walks(lengths: List[int], seed: int) -> List[DataEntry]:
    generator = np.random.default_rng(seed)
    return [
        {
            "start": pd.Period("2000-01-01 00:00", freq="h"),
            "target": generator.normal(size=length).cumsum().astype(np.float32),
        }
        for length in lengths
    ]


def mixtures(arguments: argparse.Namespace) -> Dict[str, List[DataEntry]]:
    """The series that batches are drawn from, by name."""
    generator = np.random.default_rng(arguments.seed)
    lengths = {
        "hospital": [72] * 767,
        "tourism_monthly": generator.integers(67, 310, size=366).tolist(),
        "m4_hourly": generator.choice([700, 960], size=414, p=[0.4, 0.6]).tolist(),
    }
    walks = {name: random_walks(lengths[name], arguments.seed) for name in SETS}
    named = {f"walks as {name}": entries for name, entries in walks.items()}
    named["walks as all three"] = equally_often(list(walks.values()))
    if arguments.data:
        read = {name: training_part(name, arguments.data) for name in SETS}
        named.update(read)
        named["all three"] = equally_often(list(read.values()))
    return named


def draw(entries: List[DataEntry], arguments: argparse.Namespace) -> List[Batch]:
    """Batches as in training."""
    estimator = make_estimator(arguments)
    module = estimator.create_lightning_module()
    torch.manual_seed(arguments.seed)
    return list(estimator.create_training_data_loader(entries, module))


def short_and_long(share: float, arguments: argparse.Namespace) -> List[Batch]:
    """Batches with so many short windows among full ones."""
    number = round(share * arguments.batch_size)
    lengths = [SHORT] * number + [LONG] * (arguments.batch_size - number)
    estimator = make_estimator(arguments)
    module = estimator.create_lightning_module()
    return [
        batch
        for seed in range(arguments.batches)
        for batch in estimator.create_validation_data_loader(random_walks(lengths, seed), module)
    ]


def make_estimator(arguments: argparse.Namespace) -> MoiraiMoEEstimator:
    return MoiraiMoEEstimator(
        freq=None,
        prediction_length=HORIZON,
        context_length=CONTEXT,
        patch_size=arguments.patch_size,
        distr_output="student_t",
        scaling="regularised_std",
        batch_size=arguments.batch_size,
        num_batches_per_epoch=arguments.batches,
        seed=arguments.seed,
        **SHAPES[arguments.shape],
    )


def take_steps(
    network: MoiraiMoENetwork, batches: List[Batch], largest_share: float, patch_size: int
) -> Steps:
    steps = Steps([], [], [])
    on_gpu = batches[0]["past_target"].is_cuda
    with patch.object(packing, "_LARGEST_SHARE", largest_share):
        for batch in batches:
            began = time.perf_counter()
            losses, routings = network.window_losses(batch, patch_size)
            (losses.mean() + 0.01 * total_balance_loss(routings)).backward()
            if on_gpu:
                torch.cuda.synchronize()
            steps.seconds.append(time.perf_counter() - began)
            network.zero_grad()
            routing: Routing = next(iter(routings.values()))
            steps.tokens.append(routing.ids_TK[..., 0].numel())
            counted = routing.counted_T
            steps.counted.append(steps.tokens[-1] if counted is None else int(counted.sum()))
    return steps


def compare(name: str, batches: List[Batch], arguments: argparse.Namespace) -> str:
    """A row of the table."""
    torch.manual_seed(arguments.seed)
    network = make_estimator(arguments).create_network().to(arguments.device).train()
    batches = [
        {name: tensor.to(arguments.device) for name, tensor in batch.items()} for batch in batches
    ]
    rounds = time_rounds(
        {
            way: lambda share=share: take_steps(network, batches, share, arguments.patch_size)
            for way, share in WAYS.items()
        },
        arguments.rounds,
    )
    before, after = rounds["unpacked"], rounds["packed"]
    tokens = [np.mean(way[0].tokens) for way in (before, after)]
    seconds = [
        statistics.median(second for steps in way for second in steps.seconds)
        for way in (before, after)
    ]
    ratios = [sum(plain.seconds) / sum(packed.seconds) for plain, packed in zip(before, after)]
    cells = [
        name,
        f"{np.mean(after[0].counted):,.0f}",
        *(f"{number:,.0f}" for number in tokens),
        f"{tokens[1] / tokens[0]:.0%}",
        *(f"{second * 1e3:.1f}" for second in seconds),
        f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the CSV files")
    parser.add_argument("--shares", action="store_true", help="short windows in growing shares")
    parser.add_argument("--only", nargs="+", help="some of the table's rows, by name")
    parser.add_argument("--shape", choices=list(SHAPES), default="default")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    be_quiet()

    print(
        f"{describe_machine()}; shape {arguments.shape}, patches of {arguments.patch_size}, "
        f"batches of {arguments.batch_size}\n"
    )
    print(
        "| windows | no padding | unpacked | packed | share | unpacked, ms | packed, ms | ratio |"
    )
    print("|---" * 8 + "|", flush=True)
    if arguments.shares:
        shares = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
        rows = {f"{share:.0%} short": partial(short_and_long, share) for share in shares}
    else:
        rows = {name: partial(draw, entries) for name, entries in mixtures(arguments).items()}
    for name, batches in rows.items():
        if not arguments.only or name in arguments.only:
            print(compare(name, batches(arguments), arguments), flush=True)


if __name__ == "__main__":
    main()
