"""An expert of 1 to 512 rows on a CPU, in every way that torch has for its products.

    OMP_NUM_THREADS=1 python benchmarks/expert_products.py

Each of MOIRAI small's 32 experts (384 features, 512 hidden) multiplies as many rows, one expert
after the other. The ways: the rows on the left; as columns, that is, the matrix on the left and the
rows transposed, copied to lie side by side, with the output copied back; instead of the rows on the
left, copies of the matrices packed by MKL for this number of rows, as torch.compile makes them,
without the time to pack; and, up to as many rows as these are for, the kernels of backends/cpu.c.
Printed are medians, microseconds an expert, and the time to read its matrices at the measured
memory rate. ``TorchBackend`` takes the kernels and the first two ways, by these numbers.
"""

import argparse
import statistics
from typing import Callable, Dict, Tuple

import torch
from expert_layer import NUM_EXPERTS, SHAPES, measure_memory_rate, timed
from machine import describe_machine, time_rounds
from moecast.backends import cpu
from torch import Tensor
from torch.nn import functional as F

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    features, hidden = SHAPES["small"]
    memory_rate = measure_memory_rate("cpu")
    print(f"{describe_machine()}; float32, memory {memory_rate / 1e9:.1f} GB/s\n")
    expand_EFI = torch.randn(NUM_EXPERTS, 2 * hidden, features)
    contract_EOF = torch.randn(NUM_EXPERTS, features, hidden) / 100
    stacks = expand_EFI.mT, contract_EOF.mT
    floor = (expand_EFI[0].numel() + contract_EOF[0].numel()) * 4 / memory_rate
    names = list(ways(stacks, torch.randn(1, features)))
    print(f"| number of rows | {' | '.join(names)} | reading |")
    print("|---" * (2 + len(names)) + "|", flush=True)
    with torch.inference_mode():
        for rows in arguments.rows:
            runs = ways(stacks, torch.randn(rows, features))
            times = time_rounds(
                {name: timed(run, "cpu") for name, run in runs.items()}, arguments.rounds
            )
            medians = {name: statistics.median(times[name]) for name in runs}
            cells = [
                f"{1e6 * medians[name] / NUM_EXPERTS:.0f}" if name in runs else "" for name in names
            ]
            cells.append(f"{1e6 * floor:.0f}")
            print(f"| {rows} | {' | '.join(cells)} |", flush=True)


def ways(stacks: Tuple[Tensor, Tensor], x_RI: Tensor) -> Dict[str, Callable[[], object]]:
    """Each sends the rows through every expert."""
    weights = list(zip(*(stack.mT for stack in stacks)))
    output_RO = torch.empty_like(x_RI)

    def gated(expanded: Tensor, dim: int) -> Tensor:
        gate, up = expanded.chunk(2, dim)
        return F.silu(gate, inplace=True).mul_(up)

    def by_rows() -> None:
        for expand_FI, contract_OF in weights:
            torch.mm(gated(torch.mm(x_RI, expand_FI.T), 1), contract_OF.T, out=output_RO)

    def by_columns() -> None:
        for expand_FI, contract_OF in weights:
            hidden_HR = gated(torch.mm(expand_FI, x_RI.T.contiguous()), 0)
            output_RO.copy_(torch.mm(contract_OF, hidden_HR).T)

    runs: Dict[str, Callable[[], object]] = {"rows": by_rows, "columns": by_columns}
    if torch.backends.mkl.is_available():
        rows, linear = len(x_RI), torch.ops.mkl._mkl_linear
        pack = torch.ops.mkl._mkl_reorder_linear_weight
        packed = [[(pack(matrix, rows), matrix) for matrix in pair] for pair in weights]

        def by_packed() -> None:
            for expand, contract in packed:
                hidden_RH = gated(linear(x_RI, *expand, None, rows), 1)
                linear(hidden_RH, *contract, None, rows)

        runs["packed"] = by_packed
    rows = len(x_RI)
    if rows <= cpu.MOST_ROWS and cpu.takes(x_RI, rows, range(NUM_EXPERTS), *stacks):
        tokens = torch.arange(rows).repeat(NUM_EXPERTS)
        segments = [(expert, expert * rows, rows) for expert in range(NUM_EXPERTS)]
        outputs = x_RI.new_empty(len(tokens), stacks[1].shape[-1])
        runs["kernels"] = lambda: cpu.gated_ffn(x_RI, tokens, segments, *stacks, outputs)
    return runs


if __name__ == "__main__":
    main()
