"""How the Autoformer's experts share their work on ETTh1, with and without the balance loss.

    python benchmarks/expert_load.py --data ../shared/data

Four experts, the best one for each token; by default 500 steps of 64 windows, one seed. Printed is
the share of the tokens of the test windows that each layer's experts got, the largest first. Even
would be 0.25.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

import numpy as np
import torch
from accuracy import BATCH, SETS, STEPS_PER_EPOCH, be_quiet
from gluonts.dataset.split import split
from machine import describe_machine
from moecast.forecasters import HierarchicalAutoformerEstimator

SET, NUM_EXPERTS = "ETTh1", 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.csv")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--accelerator", default="cpu", help="as Lightning names it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(arguments.threads)
    task = SETS[SET]
    training, template = split(
        task.load(arguments.data), offset=-task.windows * task.prediction_length
    )
    test = template.generate_instances(task.prediction_length, windows=task.windows).input
    trainer: Dict[str, Any] = {
        "max_epochs": arguments.steps // STEPS_PER_EPOCH,
        "accelerator": arguments.accelerator,
        "logger": False,
        "enable_progress_bar": False,
    }
    print(f"{describe_machine()}; {arguments.steps} steps\n")
    print("| aux_weight | layer | shares of its experts |\n|---|---|---|")
    for aux_weight in (0.01, 0.0):
        predictor = HierarchicalAutoformerEstimator(
            freq=task.freq,
            prediction_length=task.prediction_length,
            context_length=task.context_length,
            num_experts=NUM_EXPERTS,
            top_k=1,
            aux_weight=aux_weight,
            batch_size=BATCH,
            num_batches_per_epoch=STEPS_PER_EPOCH,
            seed=0,
            trainer_kwargs=trainer,
        ).train(training)
        for _ in predictor.predict(test):
            pass
        for layer, shares in predictor.expert_usage.chosen_share.items():
            cells = ", ".join(f"{share:.2f}" for share in np.sort(shares)[::-1])
            print(f"| {aux_weight} | {layer} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
