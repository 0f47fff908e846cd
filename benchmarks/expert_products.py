"""An expert's two products on a CPU, of 1 to 512 rows, in every way that torch has.

    OMP_NUM_THREADS=1 python benchmarks/expert_products.py

Each of 32 experts of MOIRAI small (384 features, 512 hidden) has a matrix that makes gate and up,
and one that leads back; each is multiplied with as many rows, one expert after the other. The ways:
the rows on the left; the matrix on the left and the rows transposed as they lie; the same with
copies of the rows' columns that lie side by side, copying and copying back included, which is what
``TorchBackend`` does between 4 and 159 rows; and a copy of the matrix packed by MKL for this number
of rows, as torch.compile does, without the packing. Printed are medians, microseconds an expert,
and the time to read the matrix at the measured memory rate.
"""

import argparse
import statistics
from typing import Callable, Dict

import torch
from expert_layer import NUM_EXPERTS, SHAPES, measure_memory_rate, timed
from machine import describe_machine, time_rounds
from torch import Tensor

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 96, 128, 160, 192, 256, 512)


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
    stacks = [
        torch.randn(NUM_EXPERTS, 2 * hidden, features),
        torch.randn(NUM_EXPERTS, features, hidden),
    ]
    names = list(ways(stacks[0], torch.randn(1, features)))
    print(f"| outputs × inputs | rows | {' | '.join(names)} | reading |")
    print("|---" * (3 + len(names)) + "|", flush=True)
    with torch.inference_mode():
        for stack in stacks:
            for rows in arguments.rows:
                x = torch.randn(rows, stack.shape[-1])
                runs = {name: timed(run, "cpu") for name, run in ways(stack, x).items()}
                times = time_rounds(runs, arguments.rounds)
                micros = [1e6 * statistics.median(times[name]) / NUM_EXPERTS for name in names]
                floor = 1e6 * stack[0].numel() * stack.element_size() / memory_rate
                cells = [f"{cell:.0f}" for cell in (*micros, floor)]
                print(f"| {stack.shape[1]} × {stack.shape[2]} | {rows} | {' | '.join(cells)} |")


def ways(stack_EOI: Tensor, x_RI: Tensor) -> Dict[str, Callable[[], object]]:
    """Each multiplies the rows with every matrix."""
    matrices, out_RO = stack_EOI.unbind(), x_RI.new_empty(len(x_RI), stack_EOI.shape[1])
    runs: Dict[str, Callable[[], object]] = {
        "rows": lambda: [torch.mm(x_RI, matrix.T, out=out_RO) for matrix in matrices],
        "transposed": lambda: [out_RO.copy_((matrix @ x_RI.T).T) for matrix in matrices],
        "columns": lambda: [out_RO.copy_((matrix @ x_RI.T.contiguous()).T) for matrix in matrices],
    }
    if torch.backends.mkl.is_available():
        pack, linear = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkl._mkl_linear
        packed = [pack(matrix, len(x_RI)) for matrix in matrices]
        runs["packed"] = lambda: [
            linear(x_RI, *pair, None, len(x_RI)) for pair in zip(packed, matrices)
        ]
    return runs


if __name__ == "__main__":
    main()
