"""MOIRAI-MoE's expert layer beside uni2ts's, of the same weights, and how far from the floor.

    python benchmarks/expert_layer.py                                  # float32, CPU
    python benchmarks/expert_layer.py --device cuda --dtype bfloat16   # 64 to 65,536 tokens
    python benchmarks/expert_layer.py --shape base --device cuda

A layer is the centroid router and 32 gated feed-forwards, 2 of which are chosen for each token:
384 features, 512 hidden (small), or 768 and 1,024 (base). Both programs run in turn; printed are
medians over the rounds, the median and range of the rounds' ratios, and beside them the floor: the
time to read the chosen experts' weights at the measured memory rate, or to multiply at the measured
matrix rate, whichever is longer.
"""

import argparse
import copy
import statistics
import time
from typing import Callable, Optional

import torch
from machine import describe_machine, time_rounds
from moecast.forecasters.moe import CentroidRouter, GatedExperts, routed_experts
from torch import Tensor, nn
from uni2ts.module.ffn import MoEFeedForward

NUM_EXPERTS, TOP_K = 32, 2
SHAPES = {"small": (384, 512), "base": (768, 1024)}
TOKENS = {"cpu": (1, 8, 64, 512, 8192), "cuda": (64, 512, 2048, 8192, 65536)}
BACKWARD_TOKENS = {"cpu": (512, 8192), "cuda": (512, 8192, 65536)}
# What one measurement should take at least, seconds.
SHORTEST = {"cpu": 0.05, "cuda": 0.02}


class Theirs(nn.Module):
    """uni2ts's layer of random weights, called with its centroids."""

    def __init__(self, features: int, hidden_features: int) -> None:
        super().__init__()
        self.layer = MoEFeedForward(NUM_EXPERTS, TOP_K, features, hidden_features, bias=False)
        self.register_buffer("centroids", torch.randn(NUM_EXPERTS, features))

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.layer(x_TI.unsqueeze(0), self.centroids).squeeze(0)


class Ours(nn.Module):
    """Router and experts of the same weights."""

    def __init__(self, theirs: Theirs, features: int, hidden_features: int) -> None:
        super().__init__()
        self.router = CentroidRouter(features, NUM_EXPERTS, TOP_K)
        self.experts = GatedExperts(NUM_EXPERTS, features, hidden_features)
        experts = theirs.layer.experts
        with torch.no_grad():
            self.router.centroids_EF.copy_(theirs.centroids)
            for i, expert in enumerate(experts):
                weights = (expert.fc_gate.weight, expert.fc1.weight)
                self.experts.expand[i].copy_(torch.cat(weights).T)
                self.experts.contract[i].copy_(expert.fc2.weight.T)
        # The routers of a pretrained model are not trained.
        self.router.requires_grad_(False)

    def forward(self, x_TI: Tensor) -> Tensor:
        return routed_experts(x_TI, self.router, self.experts)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, nargs="*", help="by default by device")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    features, hidden_features = SHAPES[arguments.shape]
    theirs = Theirs(features, hidden_features)
    ours = Ours(theirs, features, hidden_features)
    theirs, ours = (module.to(device=device, dtype=torch.float32) for module in (theirs, ours))
    theirs, ours = theirs.eval(), ours.eval()
    check_equal(theirs, ours, dtype)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    memory_rate, matrix_rate = measure_memory_rate(device), measure_matrix_rate(device, dtype)
    print(f"{describe_machine()}; {arguments.dtype}, {arguments.shape}, seed {arguments.seed}")
    print(f"memory {memory_rate / 1e9:.1f} GB/s, matrices {matrix_rate / 1e9:.0f} GFLOP/s\n")
    print("| tokens | pass | uni2ts, ms | moecast, ms | ratio | floor, ms | of the matrix rate |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for backward in (False, True):
        for tokens in arguments.tokens or (BACKWARD_TOKENS if backward else TOKENS)[device]:
            x = torch.randn(tokens, features, device=device, dtype=dtype)
            pair = {"uni2ts": theirs, "moecast": ours}
            runs = {
                name: timed(one_pass(layer, x, backward), device) for name, layer in pair.items()
            }
            seconds = time_rounds(runs, arguments.rounds)
            floor, operations = floor_of(ours, x, backward, memory_rate, matrix_rate)
            ratios = [a / b for a, b in zip(seconds["uni2ts"], seconds["moecast"])]
            ours_median = statistics.median(seconds["moecast"])
            cells = [
                f"{tokens:,}",
                "forward and backward" if backward else "forward",
                f"{1e3 * statistics.median(seconds['uni2ts']):.3g}",
                f"{1e3 * ours_median:.3g}",
                f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{1e3 * floor:.3g}",
                f"{operations / ours_median / matrix_rate:.0%}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def one_pass(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], Optional[Tensor]]:
    """The layer's outputs, or those and all gradients."""

    def forward() -> Optional[Tensor]:
        with torch.inference_mode():
            return layer(x)

    def forward_and_backward() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x_with_gradient).backward(gradient)

    x_with_gradient, gradient = x.clone().requires_grad_(), torch.randn_like(x)
    return forward_and_backward if backward else forward


def timed(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Seconds of one call, over as many calls as a measurement needs."""
    run()
    calls = max(1, int(SHORTEST[device] / seconds_of(run, 1, device)))
    return lambda: seconds_of(run, calls, device)


def seconds_of(run: Callable[[], object], calls: int, device: str) -> float:
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return (time.perf_counter() - begin) / calls


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check_equal(theirs: Theirs, ours: Ours, dtype: torch.dtype) -> None:
    """Refuse to time two layers that do not compute the same, or not what they do in float32."""
    x = torch.randn(256, ours.experts.expand.shape[1], device=ours.experts.expand.device)
    with torch.inference_mode():
        exact = ours(x)
        differences = {"uni2ts and moecast differ in float32": (theirs(x), 1e-5)}
        half = copy.deepcopy(ours).to(dtype)(x.to(dtype)).float()
        differences[f"moecast in {dtype} and float32 differ"] = (half, 5e-2)
    for what, (found, tolerance) in differences.items():
        # In half precision, two experts at nearly the same distance may change places.
        error = ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
        if not error < tolerance:
            raise SystemExit(f"{what} by {error:.1e}")


def floor_of(
    ours: Ours, x: Tensor, backward: bool, memory_rate: float, matrix_rate: float
) -> tuple[float, int]:
    """Seconds that reading the chosen weights or multiplying takes, and the operations."""
    expand, contract = ours.experts.expand, ours.experts.contract
    chosen = len(ours.router(x).ids_TK.unique())
    weights = expand[0].numel() + contract[0].numel()
    passes = 3 if backward else 1
    operations = passes * 2 * len(x) * TOP_K * weights
    # Backward, the weights are read again and their gradient, of all experts, is written.
    read = chosen * weights * (2 if backward else 1) + (NUM_EXPERTS * weights if backward else 0)
    return max(read * x.element_size() / memory_rate, operations / matrix_rate), operations


def measure_memory_rate(device: str) -> float:
    """Bytes read per second from a tensor larger than any cache."""
    large = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    best = min(seconds_of(large.sum, 1, device) for _ in range(5))
    return large.numel() * large.element_size() / best


def measure_matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds_of(lambda: a @ b, 1, device) for _ in range(5))
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
