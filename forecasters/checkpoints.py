"""Checkpoints of a training, and all that it takes to resume one."""

import math
import os
from pathlib import Path
from typing import Any, Dict, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from .windows import TrainingWindows

LAST = "last.ckpt"
CHECKPOINTS = "checkpoints"
CALIBRATION = "calibration"


class EpochCheckpoint(Checkpoint):
    """Writes one checkpoint an epoch; keeps the best, and the latest as ``last.ckpt``.

    A checkpoint also holds what the next epoch's randomness depends on: training that is killed
    and resumed draws the windows, patch sizes and dropout masks that it would have drawn without
    the interruption (on CPU; CUDA's generators are not kept).

    Lightning's ``ModelCheckpoint`` would write two files an epoch, one as the best and one as the
    latest, which for a small model is a good part of the training time.

    Parameters
    ----------
    windows
        The training windows, whose seed is kept.
    monitor
        The metric whose smallest value is the best.
    folder
        Where to write; by default ``checkpoints`` below the trainer's ``default_root_dir``.

    Attributes
    ----------
    best_model_path, last_model_path
        The two files, empty before the first epoch has ended.
    """

    def __init__(
        self, windows: TrainingWindows, monitor: str, folder: Optional[Path] = None
    ) -> None:
        self.windows = windows
        self.monitor = monitor
        self.folder = folder
        self.best_model_path = ""
        self.last_model_path = ""
        self._best_score = math.inf
        self._validated = False
        self._generator_state: Optional[Tensor] = None

    def state_dict(self) -> Dict[str, Any]:
        return {
            "calibration_windows": self.windows.calibration_windows,
            "seed": self.windows.seed,
            "torch": torch.get_rng_state(),
            "best_model_path": self.best_model_path,
            "last_model_path": self.last_model_path,
            "best_score": self._best_score,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.windows.seed = state_dict["seed"]
        self._generator_state = state_dict["torch"]
        self.last_model_path = state_dict["last_model_path"]
        if os.path.isfile(state_dict["best_model_path"]):
            self.best_model_path = state_dict["best_model_path"]
            self._best_score = state_dict["best_score"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._generator_state is not None:
            torch.set_rng_state(self._generator_state.cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self.folder or Path(trainer.default_root_dir, CHECKPOINTS)
        path = _unused(folder, f"epoch={trainer.current_epoch}-step={trainer.global_step}")
        before = {self.best_model_path, self.last_model_path}
        self.last_model_path = str(path)
        # Where epochs pass without validation, the metric is an older epoch's.
        current = self._validated or self.monitor == "train_loss"
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if current and score < self._best_score:
            self.best_model_path, self._best_score = str(path), score
        self._validated = False
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            _link(path, folder / LAST)
            resumed_from = trainer.ckpt_path and os.path.abspath(trainer.ckpt_path)
            kept = {"", self.best_model_path, self.last_model_path, resumed_from}
            for old in before - kept:
                # The state of a copied folder still names the files of the original.
                if Path(old).resolve().parent == folder.resolve():
                    Path(old).unlink(missing_ok=True)
        trainer.strategy.barrier()


def is_calibration_checkpoint(path: str) -> bool:
    """Whether a checkpoint was written while training without the calibration windows.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it was not written by this package.
    """
    if not os.path.isfile(path):
        message = f"there is no checkpoint at ckpt_path={path!r}"
        while_calibrating = Path(path).parent.parent / CALIBRATION / CHECKPOINTS / LAST
        if while_calibrating.is_file():
            message += f"; this training ended while it calibrated: give {str(while_calibrating)!r}"
        raise FileNotFoundError(message)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved["callbacks"][EpochCheckpoint.__qualname__]
    except Exception as error:
        raise ValueError(
            f"ckpt_path={path!r} holds no checkpoint of a moecast training "
            f"({type(error).__name__}: {error})"
        ) from None
    return state["calibration_windows"] > 0


def _unused(folder: Path, stem: str) -> Path:
    """A path that no file of an earlier training in the same folder has."""
    path, version = folder / f"{stem}.ckpt", 0
    while path.exists():
        version += 1
        path = folder / f"{stem}-v{version}.ckpt"
    return path


def _link(path: Path, link: Path) -> None:
    """Point a link at a file without a moment in which there is none."""
    beside = link.with_suffix(".new")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(path.name)
    except OSError:
        # Windows, and file systems without links.
        beside.write_bytes(path.read_bytes())
    os.replace(beside, link)
