"""What training changes, of which loss, and how it goes on."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from model_cases import QUIET, forecast_values, same_weights, series
from moecast.forecasters import MoiraiMoEEstimator, MoiraiMoEPredictor
from moecast.forecasters.moirai_moe import MoiraiMoENetwork
from moecast.forecasters.moirai_moe import network as network_module
from moecast.forecasters.moirai_moe.tuning import TUNINGS, finish_tuning, prepare_tuning
from moirai_cases import (
    COVARIATES,
    FEATURES,
    HORIZON,
    PATCH,
    fine_tuning,
    inputs_of,
    network_of,
    publishable,
    published,
    training_windows,
)
from torch import Tensor
from torch.distributions import StudentT

LAYERS = 3
RANK = 2
ADAPTED = (
    "attention.query_key_value.weight",
    "attention.output.weight",
    "experts.expand",
    "experts.contract",
)
HEAD = {"norm.weight", "parameter_projection.weight", "parameter_projection.bias"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published(folder, num_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def before() -> dict[str, Tensor]:
    """The checkpoint's weights."""
    return publishable(num_layers=LAYERS).network.state_dict()


def tuned(checkpoint: Path, **settings: Any) -> MoiraiMoEPredictor:
    """Trained on two channels, so that every weight has an effect, in steps that are seen."""
    estimator = fine_tuning(
        checkpoint, **{"target_dim": 2, "lr": 0.01, "lr_schedule": "constant", **settings}
    )
    predictor = estimator.train(series(channels=2))
    assert isinstance(predictor, MoiraiMoEPredictor)
    return predictor


def changed(before: dict[str, Tensor], predictor: MoiraiMoEPredictor) -> set[str]:
    after = predictor.network.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    return {name for name in before if not torch.equal(after[name], before[name])}


def routers(before: dict[str, Tensor]) -> set[str]:
    return {name for name in before if name.endswith("router.centroids_EF")}


def of_layers(before: dict[str, Tensor], layers: range) -> set[str]:
    return {name for name in before if any(name.startswith(f"layers.{i}.") for i in layers)}


def test_everything_but_the_routers_is_tuned_by_default(
    checkpoint: Path, before: dict[str, Tensor]
) -> None:
    assert changed(before, tuned(checkpoint)) == set(before) - routers(before)
    assert same_weights(tuned(checkpoint).network, tuned(checkpoint, tuning="full").network)


@pytest.mark.parametrize("number", [1, 2, LAYERS])
def test_last_layers_are_tuned_alone(
    checkpoint: Path, before: dict[str, Tensor], number: int
) -> None:
    last = of_layers(before, range(LAYERS - number, LAYERS))
    predictor = tuned(checkpoint, tuning="last_layers", num_tuned_layers=number)
    assert changed(before, predictor) == (last | HEAD) - routers(before)


def test_low_rank_tuning_changes_attention_experts_and_head(
    checkpoint: Path, before: dict[str, Tensor]
) -> None:
    predictor = tuned(checkpoint, tuning="low_rank", rank=RANK)
    adapted = {name for name in before if name.endswith(ADAPTED)}
    assert len(adapted) == LAYERS * len(ADAPTED)
    assert changed(before, predictor) == adapted | HEAD


@pytest.mark.parametrize("rank", [1, RANK])
def test_low_rank_updates_are_of_low_rank(
    checkpoint: Path, before: dict[str, Tensor], rank: int
) -> None:
    predictor = tuned(checkpoint, tuning="low_rank", rank=rank)
    after = predictor.network.state_dict()
    for name in (name for name in before if name.endswith(ADAPTED)):
        update = (after[name].double() - before[name].double()).reshape(
            -1, *before[name].shape[-2:]
        )
        assert len(update) == (32 if "experts" in name else 1)
        values = torch.linalg.svdvals(update)
        assert values[:, rank - 1].max() > 1e-4, name
        assert values[:, rank:].max() < 1e-5, name
    full = tuned(checkpoint).network.state_dict()
    name = "layers.0.attention.output.weight"
    assert torch.linalg.svdvals(full[name] - before[name])[RANK] > 1e-4


def test_low_rank_tuning_leaves_a_network_like_any_other(checkpoint: Path, tmp_path: Path) -> None:
    predictor = tuned(checkpoint, tuning="low_rank", rank=RANK)
    plain = publishable(num_layers=LAYERS).network
    assert [type(module) for module in predictor.network.modules()] == [
        type(module) for module in plain.modules()
    ]
    assert [name for name, _ in predictor.network.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert all(parameter.requires_grad for parameter in predictor.network.parameters())
    entries = series(channels=2)
    expected = forecast_values(predictor, entries)
    (tmp_path / "serialised").mkdir()
    predictor.serialize(tmp_path / "serialised")
    copy = MoiraiMoEPredictor.deserialize(tmp_path / "serialised")
    np.testing.assert_array_equal(forecast_values(copy, entries), expected)
    predictor.save_pretrained(tmp_path / "published")
    again = fine_tuning(tmp_path / "published", target_dim=2, tuning="low_rank").create_network()
    assert same_weights(again, predictor.network)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_routers_are_tuned_if_asked_for(
    checkpoint: Path, before: dict[str, Tensor], tuning: str
) -> None:
    with_routers = changed(before, tuned(checkpoint, tuning=tuning, tune_routers=True))
    without = changed(before, tuned(checkpoint, tuning=tuning))
    assert with_routers == without | routers(before)


def test_routers_learn_from_scratch_unless_told_otherwise() -> None:
    settings = {"prediction_length": HORIZON, "context_length": 16, "patch_size": PATCH}
    for tune_routers, learn in ((None, True), (True, True), (False, False)):
        estimator = MoiraiMoEEstimator(
            freq="h",
            d_model=16,
            num_layers=1,
            num_experts=4,
            tune_routers=tune_routers,
            seed=0,
            num_batches_per_epoch=2,
            trainer_kwargs={**QUIET, "max_epochs": 1},
            **settings,
        )
        torch.manual_seed(0)
        first = estimator.create_network().layers[0].router.centroids_EF
        trained = estimator.train(series()).network.layers[0].router.centroids_EF
        assert torch.equal(first, trained) is not learn


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("tune_routers", [False, True])
def test_gradient_reaches_what_is_tuned_and_nothing_else(tuning: str, tune_routers: bool) -> None:
    network = network_of(prediction_length=HORIZON, target_dim=2)
    prepare_tuning(network, tuning, 1, RANK, tune_routers)
    network.train()
    windows = training_windows(network)
    torch.manual_seed(0)
    for _ in range(5):  # The experts of a token depend on its window.
        losses, _ = network.window_losses(windows, PATCH)
        losses.mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        starts_at_zero = name.endswith(".right")  # Its factor is zero, and so is its gradient.
        if parameter.grad is not None and not starts_at_zero:
            assert parameter.grad.abs().max() > 0, name


def test_low_rank_tuning_starts_where_the_checkpoint_is() -> None:
    network = network_of(prediction_length=HORIZON)
    names = list(network.state_dict())
    inputs = inputs_of(network)
    with torch.no_grad():
        expected = network.outputs(inputs, PATCH).distr_args
        prepare_tuning(network, "low_rank", 1, RANK, False)
        found = network.outputs(inputs, PATCH).distr_args
        finish_tuning(network)
        after = network.outputs(inputs, PATCH).distr_args
    for ours, first, last in zip(expected, found, after, strict=True):
        assert torch.equal(first, ours)
        assert torch.equal(last, ours)
    assert list(network.state_dict()) == names


def test_low_rank_tuning_trains_few_numbers(checkpoint: Path) -> None:
    network = fine_tuning(checkpoint).create_network()
    total = sum(parameter.numel() for parameter in network.parameters())
    prepare_tuning(network, "low_rank", 1, 1, False)
    kept = sum(p.numel() for p in network.parameter_projection.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained - kept < total / 8


class FailIn(pl.Callback):
    """Ends the training at the start of an epoch; only once."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.done = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch and not self.done:
            self.done = True
            raise InterruptedError("out of tea")


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("tune_routers", [False, True])
def test_interrupted_tuning_goes_on_to_the_same_weights(
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tuning: str,
    tune_routers: bool,
) -> None:
    def estimator(*callbacks: pl.Callback) -> MoiraiMoEEstimator:
        return fine_tuning(
            checkpoint,
            tuning=tuning,
            rank=RANK,
            tune_routers=tune_routers,
            trainer_kwargs={
                **QUIET,
                "max_epochs": 3,
                "callbacks": list(callbacks),
                "default_root_dir": str(tmp_path / ("stopped" if callbacks else "whole")),
            },
        )

    whole = estimator().train(series())
    stopped = estimator(FailIn(2))
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(InterruptedError):
        stopped.train(series())
    (path,) = re.findall(r"ckpt_path='([^']+)'", caplog.text)
    assert torch.load(path, weights_only=True)["epoch"] == 1
    resumed = stopped.train(series(), ckpt_path=path)
    assert same_weights(resumed.network, whole.network)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_best_epoch_is_kept(checkpoint: Path, before: dict[str, Tensor], tuning: str) -> None:
    """Low-rank updates are added to it after it was read back."""

    class Worsen(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch > 0:
                with torch.no_grad():
                    for parameter in pl_module.network.parameters():
                        if parameter.requires_grad:
                            parameter.mul_(-20)

    def train(epochs: int, *callbacks: pl.Callback) -> MoiraiMoEPredictor:
        settings = {**QUIET, "max_epochs": epochs, "callbacks": list(callbacks)}
        return tuned(checkpoint, tuning=tuning, trainer_kwargs=settings)

    best = train(1)
    assert same_weights(train(2, Worsen()).network, best.network)


CASES: dict[str, dict[str, Any]] = {
    "univariate": {},
    "multivariate": {"target_dim": 2},
    "all features": {**FEATURES, "target_dim": 2},
    "covariates not ahead": {**COVARIATES, "covariates_ahead": False},
    "part of a patch": {"prediction_length": 3, **COVARIATES},
    "context of no whole patches": {"context_length": 18, **COVARIATES},
    "several patch sizes": {"patch_size": [4, 8], **COVARIATES},
}


@pytest.mark.parametrize("mixed", [False, True], ids=["full contexts", "mixed lengths"])
@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_likelihood_of_the_forecast_distribution(case: str, mixed: bool) -> None:
    network = network_of(**{"prediction_length": HORIZON, **CASES[case]})
    windows = training_windows(network, mixed=mixed, missing=True)
    target, observed = windows["future_target"], windows["future_observed_values"]
    for patch_size in network.patch_sizes:
        with torch.no_grad():
            losses, routings = network.window_losses(windows, patch_size)
            output = network.outputs(windows, patch_size)
        torch.testing.assert_close(
            losses, network.loss(output, target, observed), rtol=1e-5, atol=1e-5
        )
        degrees, loc, scale = output.distr_args
        scaled = (target - output.loc) / output.scale
        by_hand = -StudentT(degrees, loc, scale).log_prob(scaled) * observed
        expected = by_hand.sum(dim=(1, 2)) / observed.sum(dim=(1, 2))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        assert set(routings) == set(output.routings)


def test_loss_of_several_patches_is_that_of_each_given_those_before() -> None:
    """On the scale of the context, whatever follows it."""
    network = network_of(prediction_length=3 * PATCH, scaling="none", target_dim=2)
    windows = training_windows(network)
    past, future = windows["past_target"], windows["future_target"]
    one = network_of(
        prediction_length=PATCH, context_length=past.shape[1], scaling="none", target_dim=2
    )
    one.load_state_dict(network.state_dict())
    expected = []
    with torch.no_grad():
        for patch in range(3):
            first = patch * PATCH
            known = torch.cat([past, future[:, :first]], dim=1)
            inputs = {"past_target": known, "past_observed_values": torch.ones_like(known)}
            following = future[:, first : first + PATCH]
            output = one.outputs(inputs, PATCH)
            expected.append(one.loss(output, following, torch.ones_like(following)))
        losses, _ = network.window_losses(windows, PATCH)
    torch.testing.assert_close(losses, torch.stack(expected).mean(dim=0), rtol=1e-5, atol=1e-5)


def test_loss_in_training_is_that_of_what_follows_a_random_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = network_of(prediction_length=HORIZON, target_dim=2)
    windows = training_windows(network, mixed=True)
    with torch.no_grad():
        at_the_end, _ = network.window_losses(windows, PATCH)
        network.train()
        torch.manual_seed(0)
        drawn = torch.stack([network.window_losses(windows, PATCH)[0] for _ in range(30)])
        monkeypatch.setattr(network_module, "_SMALLEST_PREFIX", 1.0)
        whole, _ = network.window_losses(windows, PATCH)
    assert drawn.isfinite().all()
    # Of one patch, the third series', all is prefix.
    assert [len(losses.unique()) > 1 for losses in drawn.T] == [True, True, False, True]
    torch.testing.assert_close(whole, at_the_end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "number"), [(18, 1), (19, 2), (29, 12), (30, 1), (31, 2)])
def test_a_series_shorter_than_the_window_gives_several(length: int, number: int) -> None:
    """Context 28 and horizon 2; four patches of four steps are context enough."""
    estimator = MoiraiMoEEstimator("h", 2, 28, patch_size=PATCH)
    entries = [{"start": pd.Period("2024", freq="h"), "target": np.arange(float(length))}]
    loader = estimator.create_training_data_loader(entries, estimator.create_lightning_module())
    lasts = {float(last) for batch in loader for last in batch["past_target"][:, -1, 0]}
    assert lasts == {float(length - 3 - earlier) for earlier in range(number)}


def test_what_was_not_observed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "_SMALLEST_PREFIX", 0.0)
    network = network_of(prediction_length=HORIZON).train()
    windows = training_windows(network, missing=True)
    changed = dict(windows)
    unseen = windows["future_observed_values"] == 0
    changed["future_target"] = torch.where(unseen, 1e3, windows["future_target"])
    losses = []
    for each in (windows, changed):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(network.window_losses(each, PATCH)[0])
    torch.testing.assert_close(losses[0], losses[1])


def gradients(network: MoiraiMoENetwork, windows: dict[str, Tensor]) -> tuple[Tensor, dict]:
    network.train()
    torch.manual_seed(0)
    losses, _ = network.window_losses(windows, PATCH)
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_gradient_checkpointing_changes_no_gradient(
    dropout: float, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    compute = network_module.checkpoint

    def count(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return compute(*arguments, **settings)

    monkeypatch.setattr(network_module, "checkpoint", count)
    found = []
    for checkpointing in (False, True):
        assert not calls
        network = network_of(
            prediction_length=HORIZON,
            dropout=dropout,
            gradient_checkpointing=checkpointing,
            **COVARIATES,
        )
        prepare_tuning(network, tuning, 1, RANK, True)
        found.append(gradients(network, training_windows(network, mixed=True)))
    assert len(calls) == len(network.layers)
    (losses, plain), (losses_again, again) = found
    torch.testing.assert_close(losses, losses_again)
    for name in plain:
        assert (plain[name] is None) is (again[name] is None), name
        if plain[name] is not None:
            torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_training(checkpoint: Path) -> None:
    plain, again = (
        tuned(checkpoint, gradient_checkpointing=checkpointing).network.state_dict()
        for checkpointing in (False, True)
    )
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-5)
