"""One linear expert and a mixture by the protocol of the long-horizon papers, on ETTh1.

    python benchmarks/long_horizon.py --data ../shared/data

Context 336; 12, 4 and 4 months to train, validate and test; all seven channels standardised by
the training part and forecast together; squared-error loss, learning rate 0.005 halved after each
epoch, batches of 16, early stopping; every window of the test part is scored. The mixture has four
experts under the calendar router, one set of weights for each channel, as in Ni et al. (2024).
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any, Dict

import torch
from gluonts.transform.sampler import UniformSplitSampler
from machine import describe_machine
from moecast.distributions import PointOutput
from moecast.evaluation import load_long_horizon, long_horizon
from moecast.forecasters import MoLEEstimator

CONTEXT, BATCH = 336, 16
MODELS: Dict[str, Dict[str, Any]] = {
    "DLinear": {"expert": "dlinear", "scaling": "none"},
    "RLinear": {"expert": "rlinear", "scaling": "std"},
    "RMLP": {"expert": "rmlp", "scaling": "std", "hidden_dimension": 512, "dropout": 0.0},
}
MIXTURES: Dict[str, Dict[str, Any]] = {
    "one expert": {"num_experts": 1},
    "4 experts": {"num_experts": 4, "router": "calendar"},
    "4 experts, head dropout 0.2": {"num_experts": 4, "router": "calendar", "head_dropout": 0.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.csv")
    parser.add_argument("--horizons", default="96,192", help="comma-separated")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--max-epochs", type=int, default=10)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu", help="as Lightning names it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "gluonts"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)

    dataset = load_long_horizon(arguments.data / "ETTh1.csv")
    print(f"{describe_machine()}; seed {arguments.seed}, at most {arguments.max_epochs} epochs\n")
    print("| horizon | model | experts | MSE | MAE | train s |\n|---|---|---|---|---|---|")
    for horizon in map(int, arguments.horizons.split(",")):
        num_windows = dataset.borders.train - CONTEXT - horizon + 1
        for model in arguments.models.split(","):
            for label, mixture in MIXTURES.items():
                estimator = MoLEEstimator(
                    freq=dataset.freq,
                    prediction_length=horizon,
                    context_length=CONTEXT,
                    target_dim=dataset.num_channels,
                    distr_output=PointOutput("mse"),
                    lr=arguments.lr,
                    lr_schedule="halving",
                    weight_decay=0.0,
                    batch_size=BATCH,
                    num_batches_per_epoch=num_windows // BATCH,
                    early_stopping_patience=arguments.patience,
                    validation_sampler=UniformSplitSampler(
                        p=1.0, min_past=CONTEXT, min_future=horizon
                    ),
                    seed=arguments.seed,
                    trainer_kwargs={
                        "max_epochs": arguments.max_epochs,
                        "accelerator": arguments.accelerator,
                        "enable_progress_bar": False,
                    },
                    **MODELS[model],
                    **mixture,
                )
                result = long_horizon(
                    estimator,
                    dataset,
                    prediction_length=horizon,
                    context_length=CONTEXT,
                    multivariate=True,
                )
                print(
                    f"| {horizon} | {model} | {label} | {result.metrics['MSE']:.3f} | "
                    f"{result.metrics['MAE']:.3f} | {result.train_seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
