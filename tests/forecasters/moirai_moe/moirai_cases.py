"""Tiny MOIRAI-MoE networks of random weights, and windows for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Mapping

import torch
from model_cases import CONTEXT, FEATURES, FREQ, HORIZON, QUIET, moirai_moe, untrained
from moecast.distributions import resolve_head
from moecast.forecasters import MoiraiMoEEstimator, MoiraiMoEPredictor
from moecast.forecasters.fields import WindowConfig
from moecast.forecasters.moirai_moe import MoiraiMoEConfig, MoiraiMoENetwork
from torch import Tensor

PATCH = 4
# Three patches, the last not filled.
LONG = 11
BATCH = 4

DECODINGS = ("cached", "reencode")

COVARIATES = {"num_feat_dynamic_real": 2, "num_past_feat_dynamic_real": 1}


def predictor_of(**settings: Any) -> MoiraiMoEPredictor:
    """Forecasts ``LONG`` steps unless told otherwise; every weight is random."""
    predictor = untrained(moirai_moe()(**{"prediction_length": LONG, **settings}))
    assert isinstance(predictor, MoiraiMoEPredictor)
    return predictor


def network_of(**settings: Any) -> MoiraiMoENetwork:
    network = predictor_of(**settings).network
    assert isinstance(network, MoiraiMoENetwork)
    return network


def inputs_of(
    network: MoiraiMoENetwork, *, mixed: bool = False, seed: int = 0, number: int = BATCH
) -> dict[str, Tensor]:
    """Random windows.

    Parameters
    ----------
    mixed
        Of four series, let the second start late, within a patch, the third have one value, and
        the fourth gaps.
    number
        Of windows.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(spec.shape, generator=generator)
        for name, spec in network.describe_inputs(number).items()
    }
    inputs["past_target"] = 3 * inputs["past_target"] + 5
    inputs["past_observed_values"] = torch.ones_like(inputs["past_observed_values"])
    if "feat_static_cat" in inputs:
        inputs["feat_static_cat"] = torch.arange(number)[:, None] % torch.tensor([[3, 2]])
    if mixed:
        observed = inputs["past_observed_values"]
        for series, steps in ((1, 5), (2, observed.shape[1] - 1)):
            start_late(inputs, series, steps)
        observed[3, 2:4] = observed[3, 6:11] = observed[3, -1:] = 0.0
    return inputs


def start_late(inputs: dict[str, Tensor], series: int, steps: int) -> None:
    """Let a series begin after so many steps of its window."""
    inputs["past_observed_values"][series, :steps] = 0.0
    inputs["past_target"][series, :steps] = inputs["past_target"][series, steps].clone()
    for name in ("feat_dynamic_real", "past_feat_dynamic_real"):
        if name in inputs:
            inputs[name][series, :steps] = torch.nan


def training_windows(
    network: MoiraiMoENetwork, *, mixed: bool = False, missing: bool = False, number: int = BATCH
) -> dict[str, Tensor]:
    """Inputs and what follows them."""
    windows = inputs_of(network, mixed=mixed, number=number)
    steps = network.window.future_length
    generator = torch.Generator().manual_seed(1)
    shape = (len(windows["past_target"]), steps, network.window.target_dim)
    windows["future_target"] = 3 * torch.randn(shape, generator=generator) + 5
    windows["future_observed_values"] = torch.ones(shape)
    if missing:
        windows["future_observed_values"][0, 1:] = 0.0
        windows["future_observed_values"][1, :2] = 0.0
    return windows


def publishable(
    window: Mapping[str, Any] = MappingProxyType({}), **settings: Any
) -> MoiraiMoEPredictor:
    """A predictor of random weights that the published format can hold, without options of ours.

    Parameters
    ----------
    window
        Of its ``WindowConfig``.
    **settings
        Of its ``MoiraiMoEConfig``.
    """
    patch_sizes = settings.pop("patch_sizes", (PATCH,))
    config = MoiraiMoEConfig(
        **{
            "window": WindowConfig(FREQ, HORIZON, CONTEXT, **window),
            "scaling": "regularised_std",
            "patch_sizes": patch_sizes,
            "d_model": 64,
            "d_ff": 8,
            "num_layers": 2,
            "num_heads": 1,
            "max_seq_len": 16,
            **settings,
            "distr_output": resolve_head(settings.get("distr_output", "moirai_mixture")),
        }
    )
    torch.manual_seed(0)
    network = MoiraiMoENetwork(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return MoiraiMoEPredictor(network)


def published(folder: Path, **settings: Any) -> MoiraiMoEPredictor:
    """A predictor as :func:`publishable` makes it, and its checkpoint in a folder."""
    predictor = publishable(**settings)
    predictor.save_pretrained(folder)
    return predictor


def fine_tuning(checkpoint: Path, **settings: Any) -> MoiraiMoEEstimator:
    """An estimator that starts from such a checkpoint, and takes two steps."""
    return MoiraiMoEEstimator(
        **{
            "freq": FREQ,
            "prediction_length": HORIZON,
            "context_length": CONTEXT,
            "pretrained": str(checkpoint),
            "patch_size": PATCH,
            "batch_size": 8,
            "num_batches_per_epoch": 2,
            "seed": 0,
            "trainer_kwargs": {**QUIET, "max_epochs": 1},
            **settings,
        }
    )


def rewrite(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change a checkpoint's ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


__all__ = [
    "BATCH",
    "CONTEXT",
    "COVARIATES",
    "DECODINGS",
    "FEATURES",
    "HORIZON",
    "LONG",
    "PATCH",
    "fine_tuning",
    "inputs_of",
    "network_of",
    "predictor_of",
    "publishable",
    "published",
    "rewrite",
    "start_late",
    "training_windows",
]
