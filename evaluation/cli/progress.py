"""A progress bar of training with the time left."""

from __future__ import annotations

import sys
from typing import Any, Optional

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(unit: str) -> Progress:
    """A bar on standard error with the time left; nothing where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


class TrainingProgress(pl.Callback):
    """Shows the steps of a training, its last loss and the time left.

    Attributes
    ----------
    losses
        The training loss of each epoch.
    steps
        Batches trained on, with those before a resumed training stopped.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps = 0
        self._progress: Optional[Progress] = None
        self._task: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses = []
        steps = trainer.estimated_stepping_batches
        self._stop()
        self._progress = progress_bar("steps")
        self._progress.start()
        self._task = self._progress.add_task(
            "training",
            total=None if steps == float("inf") else int(steps),
            completed=trainer.global_step,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        if loss is not None:
            self.losses.append(float(loss))
            if self._progress is not None:
                self._progress.update(self._task, description=f"training, loss {float(loss):.4g}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
