"""A training process that is killed, and another that goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from model_cases import MODELS, QUIET, same_weights, series

EPOCHS = 6
KILLED_IN = 3

# Trains every model in a process of its own, which kills itself in the middle of an epoch.
WORKER = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
from model_cases import MODELS
from test_training_resume import KILLED_IN, LossFile, estimator, series


class Kill(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == KILLED_IN and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)


for name in MODELS:
    process = os.fork()
    if process == 0:
        folder = Path(sys.argv[2]) / name
        estimator(name, folder, LossFile(folder / "losses"), Kill()).train(series(), series())
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


class LossFile(pl.Callback):
    """Writes a line of epoch, steps and losses after each epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ended: dict = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.ended = {"epoch": trainer.current_epoch, "step": trainer.global_step, "lr": rate}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.ended:
            metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({**self.ended, **metrics}) + "\n")
        self.ended = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Worsen(pl.Callback):
    """Spoils the weights, so that the epoch before the kill is not the best."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == KILLED_IN - 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(-20)


def estimator(name: str, folder: Path, *callbacks: pl.Callback) -> Any:
    folder.mkdir(exist_ok=True)
    trainer_kwargs = {
        **QUIET,
        "max_epochs": EPOCHS,
        "callbacks": [Worsen(), *callbacks],
        "default_root_dir": str(folder),
    }
    return MODELS[name](trainer_kwargs=trainer_kwargs)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per model, of a process that was killed in epoch ``KILLED_IN``."""
    root = tmp_path_factory.mktemp("killed")
    arguments = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(root)]
    subprocess.run(arguments, check=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return root


def test_killed_training_goes_on_as_if_it_had_not_been(
    model: str, killed: Path, tmp_path: Path
) -> None:
    whole_losses = LossFile(tmp_path / "losses")
    whole = estimator(model, tmp_path, whole_losses).train(series(), series())

    losses = LossFile(killed / model / "losses")
    assert [line["epoch"] for line in losses.lines()] == list(range(KILLED_IN))
    (checkpoint,) = (killed / model).rglob("last.ckpt")
    resumed = estimator(model, killed / model, losses).train(
        series(), series(), ckpt_path=str(checkpoint)
    )
    assert [line["epoch"] for line in losses.lines()] == list(range(EPOCHS))
    for resumed_line, whole_line in zip(losses.lines(), whole_losses.lines()):
        assert resumed_line == pytest.approx(whole_line, rel=1e-6)
    before = [line["val_loss"] for line in whole_losses.lines()[:KILLED_IN]]
    assert min(before) < before[-1]
    assert same_weights(resumed.network, whole.network)

    ours, theirs = (
        torch.load(next(folder.rglob("last.ckpt")), weights_only=True)
        for folder in (killed / model, tmp_path)
    )
    assert ours["global_step"] == theirs["global_step"]
    states = [saved["optimizer_states"][0]["state"] for saved in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for index, moments in states[0].items():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(moments[name], states[1][index][name])


def test_weights_alone_would_not_go_on_alike(tmp_path: Path) -> None:
    """The comparison above can fail: a new optimiser and schedule give other losses."""
    name = next(iter(MODELS))
    whole = LossFile(tmp_path / "whole")
    first = estimator(name, tmp_path / "first", whole).train(series())
    restarted = LossFile(tmp_path / "restarted")
    estimator(name, tmp_path / "second", restarted).train_from(first, series())
    assert [line["epoch"] for line in restarted.lines()] == list(range(EPOCHS))
    assert restarted.lines()[KILLED_IN]["train_loss"] != pytest.approx(
        whole.lines()[KILLED_IN]["train_loss"], rel=1e-3
    )
