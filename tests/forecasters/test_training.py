"""How training runs: callbacks, randomness, checkpoints, what is logged, what goes wrong."""

from __future__ import annotations

import logging
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any, Callable

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from model_cases import DISTRIBUTION_MODELS, MODELS, QUIET, Factory, same_weights, series
from moecast.forecasters import MoEPredictor


class EpochLog(pl.Callback):
    """Writes down weights after each epoch, and its metrics when all have been logged."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(trainer.current_epoch)
        network = pl_module.network
        self.weights.append({k: v.clone() for k, v in network.state_dict().items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(self.metrics) < len(self.epochs):
            self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)


class AtEpochStart(pl.Callback):
    """Does something when an epoch starts; only once."""

    def __init__(self, epoch: int, action: Callable[[], None]) -> None:
        self.epoch = epoch
        self.action = action
        self.done = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch and not self.done:
            self.done = True
            self.action()


class Failure(Exception):
    pass


def fail() -> None:
    raise Failure("out of tea")


def interrupt() -> None:
    raise KeyboardInterrupt


def trainer(epochs: int, *callbacks: pl.Callback, **settings: Any) -> dict[str, Any]:
    return {**QUIET, "max_epochs": epochs, "callbacks": list(callbacks), **settings}


def test_second_training_keeps_callbacks_and_settings(make_estimator: Factory) -> None:
    log = EpochLog()
    given = trainer(2, log)
    estimator = make_estimator(trainer_kwargs=given)
    settings = dict(estimator.trainer_kwargs)
    first = estimator.train(series())
    assert log.epochs == [0, 1]
    second = estimator.train(series())
    assert log.epochs == [0, 1, 0, 1]
    assert given == trainer(2, log)
    assert estimator.trainer_kwargs == settings
    assert estimator.trainer_kwargs["callbacks"] == [log]
    assert same_weights(first.network, second.network)
    assert first == second


def test_second_training_leaves_the_first_predictor_alone(make_estimator: Factory) -> None:
    estimator = make_estimator(seed=None)
    first = estimator.train(series())
    before = {name: tensor.clone() for name, tensor in first.network.state_dict().items()}
    second = estimator.train(series())
    after = first.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not same_weights(first.network, second.network)


def test_callbacks_may_be_one_or_none(make_any: Factory) -> None:
    """As Lightning's Trainer takes them."""
    log = EpochLog()
    make_any(trainer_kwargs={**QUIET, "max_epochs": 1, "callbacks": log}).train(series())
    assert log.epochs == [0]
    make_any(trainer_kwargs={**QUIET, "max_epochs": 1, "callbacks": None}).train(series())


def test_ones_own_checkpoint_callback_may_be_added(make_any: Factory, tmp_path: Path) -> None:
    own = ModelCheckpoint(dirpath=tmp_path, monitor="train_loss", filename="mine")
    make_any(trainer_kwargs=trainer(1, own)).train(series())
    assert (tmp_path / "mine.ckpt").is_file()


def test_seed_makes_two_trainings_equal_and_leaves_the_generators_alone(
    make_estimator: Factory,
) -> None:
    predictors = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002
        random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        predictors.append(make_estimator(seed=7).train(series(), series()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert random.getstate() == before[2]
    assert same_weights(predictors[0].network, predictors[1].network)
    other = make_estimator(seed=8).train(series(), series())
    assert not same_weights(predictors[0].network, other.network)


def test_manual_seed_alone_makes_two_trainings_equal(make_estimator: Factory) -> None:
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(make_estimator(seed=None).train(series()).network)
    assert same_weights(networks[0], networks[1])
    assert not same_weights(networks[0], networks[2])


@pytest.mark.parametrize("validates", [False, True])
def test_weights_of_the_best_epoch_are_kept(make_estimator: Factory, validates: bool) -> None:
    log = EpochLog()
    estimator = make_estimator(
        lr=1.0, lr_schedule="constant", trainer_kwargs=trainer(6, log), num_batches_per_epoch=3
    )
    predictor = estimator.train(series(), series() if validates else None)
    monitored = "val_loss" if validates else "train_loss"
    best = int(np.argmin([metrics[monitored] for metrics in log.metrics]))
    kept = predictor.network.state_dict()
    for epoch, weights in enumerate(log.weights):
        assert all(torch.equal(kept[k], weights[k]) for k in kept) == (epoch == best)


def test_some_model_is_not_best_in_its_last_epoch() -> None:
    """Otherwise the test above could not tell the best weights from the last."""
    for make in MODELS.values():
        log = EpochLog()
        make(
            lr=1.0, lr_schedule="constant", trainer_kwargs=trainer(6, log), num_batches_per_epoch=3
        ).train(series(), series())
        losses = [metrics["val_loss"] for metrics in log.metrics]
        if np.argmin(losses) != len(losses) - 1:
            return
    pytest.fail("every model was best in its last epoch")


def test_training_stops_when_nothing_improves(make_any: Factory) -> None:
    log = EpochLog()
    estimator = make_any(
        lr=1e-30,
        weight_decay=0.0,
        early_stopping_patience=2,
        trainer_kwargs=trainer(20, log),
        num_batches_per_epoch=2,
    )
    estimator.train(series(), series())
    assert log.epochs == [0, 1, 2]


def test_training_without_checkpoints(make_any: Factory, tmp_path: Path) -> None:
    log = EpochLog()
    settings = trainer(2, log, enable_checkpointing=False, default_root_dir=str(tmp_path))
    predictor = make_any(trainer_kwargs=settings).train(series())
    assert not list(tmp_path.rglob("*.ckpt"))
    kept = predictor.network.state_dict()
    assert all(torch.equal(kept[name], log.weights[-1][name]) for name in kept)


def test_root_folder_of_none_is_no_folder(
    make_any: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_any(trainer_kwargs=trainer(1, default_root_dir=None)).train(series())
    assert not list(tmp_path.iterdir())


def test_last_checkpoint_of_a_second_training_is_its_own(make_any: Factory, tmp_path: Path) -> None:
    """In one folder, `last.ckpt` is where the latest training ended."""
    for epochs in (3, 1):
        settings = trainer(epochs, default_root_dir=str(tmp_path))
        make_any(trainer_kwargs=settings).train(series())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 0


def test_step_limit_is_not_cut_short_by_an_epoch_limit(make_any: Factory) -> None:
    """Who asks for 101 steps of one an epoch gets them, not the default of 100 epochs."""
    log = EpochLog()
    settings = {**QUIET, "max_steps": 101, "callbacks": [log], "enable_checkpointing": False}
    make_any(trainer_kwargs=settings, num_batches_per_epoch=1, batch_size=1).train(series())
    assert len(log.epochs) == 101


def test_callbacks_see_the_losses_of_the_epoch_that_ends(make_any: Factory) -> None:
    """In their `on_train_epoch_end`, as in any Lightning training."""
    seen = []

    class Reader(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append({name: metrics[name].item() for name in ("train_loss", "val_loss")})

    log = EpochLog()
    make_any(trainer_kwargs=trainer(3, Reader(), log)).train(series(), series())
    for here, final in zip(seen, log.metrics):
        assert here == {name: final[name] for name in here}


class FirstLoss(pl.Callback):
    def __init__(self) -> None:
        self.total: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.total.append(float(outputs["loss"]))


def test_balance_loss_is_added_and_logged_apart(make_estimator: Factory) -> None:
    """`train_loss` is the head's loss whatever `aux_weight` is."""
    seen = []
    for weight in (0.0, 100.0):
        log, first = EpochLog(), FirstLoss()
        estimator = make_estimator(
            aux_weight=weight, num_batches_per_epoch=1, trainer_kwargs=trainer(1, log, first)
        )
        estimator.train(series())
        seen.append((log.metrics[0], first.total[0]))
    (plain, plain_total), (weighted, weighted_total) = seen
    assert weighted["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    assert plain_total == pytest.approx(plain["train_loss"], rel=1e-5)
    balance = weighted.get("balance_loss", 0.0)
    assert weighted_total == pytest.approx(weighted["train_loss"] + 100 * balance, rel=1e-4)


def test_sparse_models_have_a_balance_loss() -> None:
    log = EpochLog()
    MODELS["mole top-2 noisy"](trainer_kwargs=trainer(1, log)).train(series())
    assert 0.5 < log.metrics[0]["balance_loss"] < 3.0


def test_exception_in_a_callback_reaches_the_caller(
    make_any: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = trainer(4, AtEpochStart(2, fail), default_root_dir=str(tmp_path))
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(Failure, match="out of tea"):
        make_any(trainer_kwargs=settings).train(series())
    path = named_checkpoint(caplog)
    assert tmp_path in path.parents
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_exception_leaves_a_checkpoint_also_without_a_root_folder(
    make_any: Factory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = trainer(4, AtEpochStart(1, fail))
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(Failure):
        make_any(trainer_kwargs=settings).train(series())
    assert named_checkpoint(caplog).is_file()


def named_checkpoint(caplog: pytest.LogCaptureFixture) -> Path:
    (name,) = re.findall(r"ckpt_path='([^']+)'", caplog.text)
    return Path(name)


def test_exception_before_any_checkpoint_reaches_the_caller(make_any: Factory) -> None:
    with pytest.raises(Failure):
        make_any(trainer_kwargs=trainer(2, AtEpochStart(0, fail))).train(series())


def test_exception_restores_the_generators(make_any: Factory) -> None:
    before = torch.get_rng_state()
    with pytest.raises(Failure):
        make_any(trainer_kwargs=trainer(2, AtEpochStart(1, fail))).train(series())
    assert torch.equal(torch.get_rng_state(), before)


def test_interruption_reaches_the_caller_and_can_be_repeated(make_any: Factory) -> None:
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        settings = trainer(3, AtEpochStart(1, interrupt))
        with pytest.raises(KeyboardInterrupt):
            make_any(trainer_kwargs=settings).train(series())
        assert signal.getsignal(signal.SIGINT) is handler


def test_interrupted_training_goes_on_to_the_same_weights(
    make_estimator: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_estimator(trainer_kwargs=trainer(4)).train(series(), series())
    log = EpochLog()
    settings = trainer(4, AtEpochStart(2, fail), log, default_root_dir=str(tmp_path))
    estimator = make_estimator(trainer_kwargs=settings)
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(Failure):
        estimator.train(series(), series())
    resumed = estimator.train(series(), series(), ckpt_path=str(named_checkpoint(caplog)))
    assert log.epochs == [0, 1, 2, 3]
    assert same_weights(resumed.network, whole.network)


def test_resumed_training_draws_what_the_interrupted_would_have(
    make_estimator: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where only the global generator was seeded, and by now stands elsewhere."""
    torch.manual_seed(5)
    whole = make_estimator(seed=None, trainer_kwargs=trainer(4)).train(series())
    settings = trainer(4, AtEpochStart(2, fail), default_root_dir=str(tmp_path))
    estimator = make_estimator(seed=None, trainer_kwargs=settings)
    torch.manual_seed(5)
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(Failure):
        estimator.train(series())
    torch.manual_seed(6)
    resumed = estimator.train(series(), ckpt_path=str(named_checkpoint(caplog)))
    assert same_weights(resumed.network, whole.network)


@pytest.mark.parametrize("model", DISTRIBUTION_MODELS)
@pytest.mark.parametrize("phase", [0, 1])
def test_interrupted_calibrated_training_goes_on_to_the_same_predictor(
    make_estimator: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture, phase: int
) -> None:
    """Whether it was stopped in the training to calibrate on (0) or in the final one (1)."""
    whole = make_estimator(calibration_windows=2, trainer_kwargs=trainer(4)).train(series())
    stop = InTraining(phase, epoch=2)
    settings = trainer(4, stop, default_root_dir=str(tmp_path))
    estimator = make_estimator(calibration_windows=2, trainer_kwargs=settings)
    with caplog.at_level(logging.ERROR, "moecast"), pytest.raises(Failure):
        estimator.train(series())
    resumed = estimator.train(series(), ckpt_path=str(named_checkpoint(caplog)))
    assert same_weights(resumed.network, whole.network)
    assert resumed.calibration == whole.calibration


class InTraining(pl.Callback):
    """Fails once, in the given epoch of the given training, counted from 0."""

    def __init__(self, training: int, epoch: int) -> None:
        self.training = training
        self.epoch = epoch
        self.started = -1
        self.done = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started += 1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        here = (self.started, trainer.current_epoch)
        if here == (self.training, self.epoch) and not self.done:
            self.done = True
            fail()


def test_resuming_with_a_later_end_trains_on(make_any: Factory, tmp_path: Path) -> None:
    estimator = make_any(trainer_kwargs=trainer(2, default_root_dir=str(tmp_path)))
    estimator.train(series())
    log = EpochLog()
    longer = make_any(trainer_kwargs=trainer(4, log, default_root_dir=str(tmp_path)))
    longer.train(series(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert log.epochs == [2, 3]


def test_last_checkpoint_is_of_the_last_epoch_also_if_nothing_improved(
    make_any: Factory, tmp_path: Path
) -> None:
    """Else a resumed training would start again from the best epoch."""

    class Worsen(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch > 0:
                with torch.no_grad():
                    for parameter in module.network.parameters():
                        parameter.mul_(-20)

    settings = trainer(3, Worsen(), default_root_dir=str(tmp_path))
    make_any(trainer_kwargs=settings).train(series(), series())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2


def test_resuming_in_a_copy_leaves_the_original_alone(make_any: Factory, tmp_path: Path) -> None:
    original, copied = tmp_path / "original", tmp_path / "copied"
    make_any(trainer_kwargs=trainer(2, default_root_dir=str(original))).train(series())
    shutil.copytree(original, copied, symlinks=True)
    before = sorted(original.rglob("*.ckpt"))
    longer = make_any(trainer_kwargs=trainer(4, default_root_dir=str(copied)))
    longer.train(series(), ckpt_path=str(copied / "checkpoints" / "last.ckpt"))
    assert sorted(original.rglob("*.ckpt")) == before
    assert all(path.is_file() for path in before)


def test_checkpoint_of_other_settings_is_refused_in_one_sentence(
    make_any: Factory, tmp_path: Path
) -> None:
    settings = trainer(1, default_root_dir=str(tmp_path))
    make_any(trainer_kwargs=settings).train(series())
    other = make_any(context_length=9, trainer_kwargs=trainer(2, default_root_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"ckpt_path=.*last\.ckpt.* do not fit the network"):
        other.train(series(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))


def test_missing_checkpoint_tells_of_the_one_of_the_calibration(
    make_any: Factory, tmp_path: Path
) -> None:
    (tmp_path / "calibration" / "checkpoints").mkdir(parents=True)
    there = tmp_path / "calibration" / "checkpoints" / "last.ckpt"
    there.touch()
    with pytest.raises(FileNotFoundError, match=re.escape(f"give {str(there)!r}")):
        make_any().train(series(), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("calibration_windows", [0, 2])
def test_missing_checkpoint_is_said_before_training(
    make_any: Factory, tmp_path: Path, calibration_windows: int
) -> None:
    log = EpochLog()
    estimator = make_any(calibration_windows=calibration_windows, trainer_kwargs=trainer(1, log))
    missing = tmp_path / "nowhere" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        estimator.train(series(), ckpt_path=str(missing))
    assert not log.epochs


def test_diverging_training_says_what_to_change(make_estimator: Factory) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            with torch.no_grad():
                for parameter in module.network.parameters():
                    parameter.fill_(torch.nan)

    with pytest.raises(RuntimeError, match=r"lr=0\.01"):
        make_estimator(trainer_kwargs=trainer(3, Poison())).train(series())


def test_train_model_keeps_the_trainer(make_any: Factory) -> None:
    output = make_any().train_model(series(), series())
    assert output.trainer.current_epoch == 2
    assert isinstance(output.predictor, MoEPredictor)
    assert same_weights(output.trained_net.network, output.predictor.network)
    assert not output.predictor.network.training


def test_shuffle_buffer_length_is_taken(make_any: Factory) -> None:
    plain = make_any().train(series())
    buffered = make_any().train(series(), shuffle_buffer_length=10)
    assert same_weights(plain.network, buffered.network)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_any_precision(make_any: Factory, precision: str) -> None:
    """A norm of next to nothing, which every gradient exceeds."""
    before: list[torch.Tensor] = []

    class Start(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before.extend(parameter.detach().clone() for parameter in pl_module.parameters())

    trainer = {**QUIET, "max_epochs": 1, "precision": precision, "gradient_clip_val": 1e-12}
    estimator = make_any(trainer_kwargs={**trainer, "callbacks": [Start()]}, weight_decay=0.0)
    network = estimator.train_model(series()).trained_net.network
    # Adam divides by the size of the gradient and 1e-8 besides.
    for then, now in zip(before, network.parameters()):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-4)
