"""Device programs and copies between host and device for one forward of each model, on ttnn.

Needs a Tenstorrent device, a simulated or a mock one: docs/backends.md says how to have one.

    python benchmarks/ttnn_programs.py
"""

from __future__ import annotations

from typing import Any

import torch
from moecast.backends.ttnn import find_device
from moecast.backends.ttnn.counting import counted
from moecast.forecasters import (
    HierarchicalAutoformerEstimator,
    MoEEstimator,
    MoEPredictor,
    MoiraiMoEEstimator,
    MoLEEstimator,
)
from rich.console import Console
from rich.table import Table

BATCH, CONTEXT, HORIZON = 4, 96, 16
SHARED: dict[str, Any] = {
    "freq": "h",
    "prediction_length": HORIZON,
    "context_length": CONTEXT,
    "backend": "torch",
}
TWO_LAYERS: dict[str, Any] = {"d_model": 64, "d_ff": 64, "num_experts": 8, "top_k": 2}
MODELS: dict[str, MoEEstimator] = {
    "MoLE, 8 DLinear experts, dense": MoLEEstimator(**SHARED, expert="dlinear"),
    "MoLE, 8 RMLP experts, top-2": MoLEEstimator(**SHARED, expert="rmlp", top_k=2),
    "MOIRAI-MoE, 2 layers, top-2 of 8": MoiraiMoEEstimator(
        **SHARED, **TWO_LAYERS, num_layers=2, num_heads=2, patch_size=16
    ),
    "Autoformer, 1 + 1 layers, top-2 of 8": HierarchicalAutoformerEstimator(
        **SHARED, **TWO_LAYERS, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
    ),
}


def untrained(estimator: MoEEstimator) -> MoEPredictor:
    torch.manual_seed(0)
    return estimator.create_predictor(None, estimator.create_lightning_module().eval())


def main() -> None:
    table = Table("model", "layers with experts", "programs", "uploads", "downloads")
    for name, estimator in MODELS.items():
        network = untrained(estimator).to_backend("ttnn").network.eval()
        inputs = {
            key: torch.randn(spec.shape) for key, spec in network.describe_inputs(BATCH).items()
        }
        inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
        with torch.inference_mode():
            layers = len(network.outputs(inputs).routings)  # The weights are uploaded here.
            with counted() as counts:
                network.outputs(inputs)
        numbers = layers, counts.programs, counts.uploads, counts.downloads
        table.add_row(name, *map(str, numbers))
    device = find_device()
    console = Console(width=90)
    console.print(f"One forward of {BATCH} series on a {device.kind if device else 'lost'} device")
    console.print(table)


if __name__ == "__main__":
    main()
