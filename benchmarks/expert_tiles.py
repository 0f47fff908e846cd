"""Which tiles the CUDA kernels of the experts should work in: every candidate, timed by itself.

    python benchmarks/expert_tiles.py --dtype bfloat16 --shape small
    python benchmarks/expert_tiles.py --dtype float32 --shape base --tokens 512

For each number of tokens and each kind of product, milliseconds of the fastest candidates and of
what ``tiles_for`` in backends/cuda.py chooses, on the device alone and with a cold cache; then what
the steps around the products take, and the same layer by ``torch.nn.functional.grouped_mm``.
"""

import argparse
from itertools import product
from typing import Callable, Dict, List

import torch
import triton
from expert_layer import NUM_EXPERTS, SHAPES, TOKENS, TOP_K
from machine import describe_machine
from moecast.backends import Scoring, cuda
from moecast.backends.cuda import Tile
from torch import Tensor
from torch.nn import functional as F

KINDS = ("expand", "contract", "gradient")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS["cuda"])
    parser.add_argument("--kinds", choices=KINDS, nargs="*", default=KINDS)
    parser.add_argument("--fastest", type=int, default=3, help="how many candidates to print")
    parser.add_argument("--compile", action="store_true", help="compile the candidates and end")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype, shape = getattr(torch, arguments.dtype), SHAPES[arguments.shape]
    print(f"{describe_machine()}; {arguments.dtype}, {arguments.shape}\n")
    print("| tokens | kind | tile | ms | TFLOP/s |")
    print("|---|---|---|---|---|", flush=True)
    for tokens in arguments.tokens:
        layer = Layer(tokens, *shape, dtype)
        for kind in arguments.kinds:
            run = layer.products()[kind]
            chosen = getattr(layer.launch.tiles, kind)
            times = {}
            for tile in dict.fromkeys([*candidates(kind, dtype, tokens), chosen]):
                layer.launch.tiles = layer.launch.tiles._replace(**{kind: tile})
                try:
                    times[tile] = milliseconds(run, once=arguments.compile)
                except triton.runtime.errors.OutOfResources:
                    continue
            layer.launch.tiles = layer.launch.tiles._replace(**{kind: chosen})
            if arguments.compile:
                continue
            ranking = sorted(times, key=lambda tile: times[tile])[: arguments.fastest]
            for tile in dict.fromkeys([*ranking, chosen]):
                name = ", ".join(f"{value}" for value in tile) + (" *" if tile == chosen else "")
                rate = layer.operations(kind) / times[tile] / 1e9
                print(f"| {tokens:,} | {kind} | {name} | {times[tile]:.4f} | {rate:.0f} |")
        steps = {} if arguments.compile else layer.steps()
        for name, run in steps.items():
            print(f"| {tokens:,} | {name} | | {milliseconds(run):.4f} | |", flush=True)


def candidates(kind: str, dtype: torch.dtype, tokens: int) -> List[Tile]:
    """Tiles worth trying, of which some need more memory than there is."""
    rows_per_expert = tokens * TOP_K / NUM_EXPERTS
    if kind == "gradient":
        sizes = product((64, 128), (64, 128), (32, 64), (4, 8), (3,))
    elif dtype == torch.float32:
        sizes = product((16, 32, 64, 128), (32, 64), (32,), (4, 8), (2, 3))
    elif rows_per_expert <= 64:
        sizes = product((16, 32, 64), (32, 64), (64, 128), (4,), (3, 5))
    elif kind == "expand":
        sizes = product((64, 128), (64, 128), (64,), (4, 8), (3, 4), (1, 2, 4))
    else:
        sizes = product((64, 128), (128, 256), (64,), (4, 8), (3, 4), (1, 3))
    return [Tile(*each) for each in sizes]


class Layer:
    """Experts, random tokens, and everything that is computed of them."""

    def __init__(
        self, tokens: int, features: int, hidden_features: int, dtype: torch.dtype
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=dtype)

        self.x_TI = normal(tokens, features)
        self.scoring = Scoring(normal(NUM_EXPERTS, features), True, False)
        self.weights_TK, self.ids_TK, _ = cuda.route(self.x_TI, self.scoring, TOP_K)
        self.expand_EIF = normal(NUM_EXPERTS, 2 * hidden_features, features).mT / features**0.5
        self.contract_EFO = normal(NUM_EXPERTS, features, hidden_features).mT
        self.launch = cuda._Launcher(self.ids_TK, self.contract_EFO)
        self.hidden_RH = self.launch.expand(self.x_TI, self.expand_EIF, None)
        self.outputs = self.launch.contract(self.hidden_RH, self.contract_EFO)

    def products(self) -> Dict[str, Callable[[], object]]:
        launch, expanded = self.launch, torch.cat([self.hidden_RH, self.hidden_RH], dim=1)
        return {
            "expand": lambda: launch.expand(self.x_TI, self.expand_EIF, None),
            "contract": lambda: launch.contract(self.hidden_RH, self.contract_EFO),
            "gradient": lambda: launch.weight_gradient(
                self.x_TI, expanded, self.expand_EIF, a_of_tokens=True, b_of_tokens=False
            ),
        }

    def steps(self) -> Dict[str, Callable[[], object]]:
        launch, expanded = self.launch, torch.cat([self.hidden_RH, self.hidden_RH], dim=1)
        arguments = self.x_TI, self.weights_TK, self.ids_TK, self.expand_EIF, self.contract_EFO
        return {
            "route": lambda: cuda.route(self.x_TI, self.scoring, TOP_K),
            "sort": lambda: cuda._sort(self.ids_TK, NUM_EXPERTS),
            "mix": lambda: launch.mix(self.outputs, self.weights_TK),
            "gradient of the hidden": lambda: launch.hidden_gradient(
                self.x_TI, self.weights_TK, self.contract_EFO, expanded
            ),
            "all but the router": lambda: cuda.gated_ffn(*arguments),
            "the same by grouped_mm": lambda: by_grouped_mm(*arguments),
        }

    def operations(self, kind: str) -> int:
        weight = self.contract_EFO if kind == "contract" else self.expand_EIF
        return 2 * self.ids_TK.numel() * weight[0].numel()


def by_grouped_mm(
    x_TI: Tensor, weights_TK: Tensor, ids_TK: Tensor, expand_EIF: Tensor, contract_EFO: Tensor
) -> Tensor:
    """The layer in torch's own products of groups."""
    order = ids_TK.flatten().argsort()
    ends = torch.bincount(ids_TK.flatten(), minlength=NUM_EXPERTS).cumsum(0, dtype=torch.int32)
    grouped = x_TI.index_select(0, order // TOP_K)
    gate, up = F.grouped_mm(grouped, expand_EIF, offs=ends).chunk(2, dim=-1)
    outputs = F.grouped_mm(F.silu(gate) * up, contract_EFO, offs=ends)
    outputs = outputs * weights_TK.flatten().index_select(0, order).unsqueeze(-1)
    return torch.zeros_like(x_TI).index_add_(0, order // TOP_K, outputs)


def milliseconds(run: Callable[[], object], once: bool = False) -> float:
    if once:
        run()
        return float("nan")
    with torch.inference_mode():
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")


if __name__ == "__main__":
    main()
