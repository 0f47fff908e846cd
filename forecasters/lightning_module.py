"""One training step for all models."""

import dataclasses
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from .fields import FrozenSettings
from .moe import total_balance_loss
from .network import ForecastNetwork

LR_SCHEDULES = ("one_cycle", "constant", "halving")

_WARM_UP = 0.3
_INITIAL_FACTOR = 1 / 25


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(FrozenSettings):
    """How the weights are updated; :class:`MoEEstimator` describes each setting.

    Raises
    ------
    ValueError
        If a number is out of range or the schedule unknown.
    """

    lr: float = 2e-3
    weight_decay: float = 1.0
    lr_schedule: str = "one_cycle"
    aux_weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive")
        for name in ("weight_decay", "aux_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} is unknown: "
                f"choose one of {', '.join(LR_SCHEDULES)}"
            )


class ForecastModule(pl.LightningModule):
    """Trains a network: the head's loss, plus ``aux_weight`` times the balance loss.

    ``train_loss`` and ``val_loss`` are the head's loss alone, because checkpoints are chosen by
    them; the balance loss is logged as ``balance_loss``.

    Parameters
    ----------
    network
        What is trained.
    optimizer_config
        How.
    """

    def __init__(self, network: ForecastNetwork, optimizer_config: OptimizerConfig) -> None:
        super().__init__()
        self.network = network
        self.optimizer_config = optimizer_config
        self._epoch_losses: Dict[str, List[Tensor]] = {}

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        try:
            losses, routings = self.network.window_losses(batch, self._draw_patch_size())
            loss = losses.mean()
        except ValueError as error:
            # torch's distributions refuse the arguments that NaN weights give.
            if all(parameter.isfinite().all() for parameter in self.network.parameters()):
                raise
            raise self._diverged("a weight", "NaN or infinite") from error
        self._remember("train_loss", loss)
        total = loss
        if any(routing.is_sparse for routing in routings.values()):
            balance = total_balance_loss(routings)
            self._remember("balance_loss", balance)
            total = loss + self.optimizer_config.aux_weight * balance
        if self.trainer.is_last_batch:
            self._log_epoch()
        return total

    def _diverged(self, what: str, value: object) -> RuntimeError:
        return RuntimeError(
            f"{what} became {value} in epoch {self.current_epoch}: "
            f"lower lr={self.optimizer_config.lr} or set gradient_clip_val in trainer_kwargs"
        )

    def _remember(self, name: str, loss: Tensor) -> None:
        # Logged once an epoch: Lightning's log takes longer than a small model's forward pass.
        self._epoch_losses.setdefault(name, []).append(loss.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning sets it around every hook; torch would each time ask if it is a parameter.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[Union[int, float]] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip as Lightning does, but on CPU leave gradients alone that are short enough."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        if by_norm and gradient_clip_val and self.device.type == "cpu":
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
            if torch.linalg.vector_norm(norms) <= gradient_clip_val:
                return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def transfer_batch_to_device(
        self, batch: Mapping[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> Dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss over the patch sizes, so that it does not depend on a draw."""
        losses = [
            self.network.window_losses(batch, patch_size)[0].mean()
            for patch_size in self.network.patch_sizes
        ]
        loss = torch.stack(losses).mean()
        size = len(batch["future_target"])
        self.log("val_loss", loss, on_epoch=True, on_step=False, prog_bar=True, batch_size=size)
        return loss

    def _draw_patch_size(self) -> int:
        sizes = self.network.patch_sizes
        return sizes[0] if len(sizes) == 1 else sizes[int(torch.randint(len(sizes), ()))]

    def on_train_epoch_end(self) -> None:
        if self._epoch_losses:
            self._log_epoch()

    def _log_epoch(self) -> None:
        means = {name: torch.stack(losses).mean() for name, losses in self._epoch_losses.items()}
        self._epoch_losses.clear()
        if not torch.isfinite(means["train_loss"]):
            raise self._diverged("train_loss", means["train_loss"].item())
        for name, mean in means.items():
            self.log(
                name,
                mean,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "train_loss",
                sync_dist=True,
                batch_size=1,
            )

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        trained = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if p.dim() > 1 and not name.endswith("bias")]
        others = [p for name, p in trained if p.dim() <= 1 or name.endswith("bias")]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.lr,
            # Lightning refuses to clip gradients of a fused optimiser in mixed precision.
            fused=not isinstance(self.trainer.precision_plugin, MixedPrecision),
        )
        factor, interval = self._lr_factor()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval},
        }

    def _lr_factor(self) -> Tuple[Callable[[int], float], str]:
        """Factor on the learning rate, and whether it changes by step or by epoch."""
        schedule = self.optimizer_config.lr_schedule
        if schedule == "constant":
            return lambda epoch: 1.0, "epoch"
        if schedule == "halving":
            return lambda epoch: 0.5**epoch, "epoch"
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError(
                "lr_schedule='one_cycle' must know when training ends: set max_epochs or max_steps "
                "in trainer_kwargs, or use lr_schedule='constant'"
            )
        return lambda step: one_cycle_factor(step / max(total, 1)), "step"


def one_cycle_factor(progress: float) -> float:
    """Factor on the learning rate after this share of all steps.

    A cosine up over the first 30%, from 1/25, and a cosine down to 0 over the rest (the shape of
    Smith & Topin 2018, as torch's ``OneCycleLR`` has it). Unlike that class it depends on no
    state, so that a resumed training may end later than was planned.
    """
    progress = min(progress, 1.0)
    if progress < _WARM_UP:
        rise = 0.5 - 0.5 * math.cos(math.pi * progress / _WARM_UP)
        return _INITIAL_FACTOR + (1.0 - _INITIAL_FACTOR) * rise
    return 0.5 + 0.5 * math.cos(math.pi * (progress - _WARM_UP) / (1.0 - _WARM_UP))
