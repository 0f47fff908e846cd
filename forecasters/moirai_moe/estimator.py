"""The MOIRAI-MoE estimator."""

import inspect
from typing import Any, Dict, Optional

from typing_extensions import Unpack

from ...distributions import resolve_head
from ..estimator import (
    MoEEstimator,
    SharedSettings,
    default_context_length,
    takes_shared_settings,
)
from ..network import ForecastNetwork
from .config import MoiraiMoEConfig
from .network import MoiraiMoENetwork
from .predictor import MoiraiMoEPredictor, PublishedCheckpoint
from .tuning import TUNINGS, finish_tuning, prepare_tuning

_FROM_SCRATCH: Dict[str, Any] = {
    "d_model": 64,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_experts": 16,
    "top_k": 2,
    "max_seq_len": 512,
    "dropout": 0.0,
    "covariates_ahead": True,
}
# What fine-tuning may have otherwise than the checkpoint.
_FREE = ("dropout", "covariates_ahead")


class MoiraiMoEEstimator(MoEEstimator):
    """A transformer over patches with sparse experts (Liu et al. 2024, arXiv 2410.10469).

    Trains from scratch, or fine-tunes a published checkpoint.

    Parameters
    ----------
    freq, prediction_length, context_length
        As for :class:`MoEEstimator`.
    pretrained
        A folder, or a name on the Hugging Face hub, of a checkpoint to start from; see
        :meth:`MoiraiMoEPredictor.from_pretrained`. It fixes architecture, head and scaling.
    d_model, d_ff, num_layers, num_heads
        Features of a token, hidden features of an expert, layers, and attention heads (default:
        64, 64, 3, 4; the published small model has 384, 512, 6, 6).
    num_experts, top_k
        Experts of each layer, and how many each token is sent to (default: 16 and 2; published:
        32 and 2).
    max_seq_len
        The most patches that context and horizon may have (default: 512).
    dropout
        Probability that a number is dropped behind attention and experts (default: 0).
    covariates_ahead
        Whether a token reads the known covariates of the patch after it, which it tells, instead
        of its own patch's (default: from scratch, not in fine-tuning, because published models
        read their own; the first patch of their forecasts thus knows no future covariates).
    decoding
        How horizons of several patches are drawn: ``"cached"`` or ``"reencode"``; see
        :mod:`moecast.forecasters.moirai_moe.decoding`.
    num_samples
        Paths of each forecast of several patches.
    tuning
        What is trained: ``"full"``, ``"last_layers"``, or ``"low_rank"`` for low-rank updates of
        attention and experts (Hu et al. 2022), which are added to the weights after training.
    num_tuned_layers, rank
        For ``"last_layers"`` and ``"low_rank"``.
    tune_routers
        Whether routers learn (default: from scratch, not in fine-tuning).
    gradient_checkpointing
        Compute each layer again in the backward pass instead of keeping what it needs.
    **shared
        The settings that all models share: see :class:`MoEEstimator`. Here ``patch_size`` is 16,
        ``lr`` 0.001 and ``weight_decay`` 0.1 by default.

    Raises
    ------
    ValueError
        If a setting is out of range or unknown, contradicts the checkpoint, or the checkpoint
        cannot be read.

    Examples
    --------
    >>> estimator = MoiraiMoEEstimator(freq="h", prediction_length=24)
    >>> predictor = estimator.train(dataset)  # doctest: +SKIP
    """

    predictor_class = MoiraiMoEPredictor

    @takes_shared_settings(patch_size=16, lr=1e-3, weight_decay=0.1)
    def __init__(
        self,
        freq: Optional[str],
        prediction_length: int,
        context_length: Optional[int] = None,
        pretrained: Optional[str] = None,
        d_model: Optional[int] = None,
        d_ff: Optional[int] = None,
        num_layers: Optional[int] = None,
        num_heads: Optional[int] = None,
        num_experts: Optional[int] = None,
        top_k: Optional[int] = None,
        max_seq_len: Optional[int] = None,
        dropout: Optional[float] = None,
        covariates_ahead: Optional[bool] = None,
        decoding: str = "cached",
        num_samples: int = 100,
        tuning: str = "full",
        num_tuned_layers: int = 1,
        rank: int = 8,
        tune_routers: Optional[bool] = None,
        gradient_checkpointing: bool = False,
        **shared: Unpack[SharedSettings],
    ) -> None:
        checkpoint = None if pretrained is None else PublishedCheckpoint(pretrained)
        given = {
            name: value
            for name, value in {
                "d_model": d_model,
                "d_ff": d_ff,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_experts": num_experts,
                "top_k": top_k,
                "max_seq_len": max_seq_len,
                "dropout": dropout,
                "covariates_ahead": covariates_ahead,
            }.items()
            if value is not None
        }
        architecture = {**_FROM_SCRATCH, **given}
        if checkpoint is not None:
            fixed = checkpoint.settings
            architecture = {**fixed, **{n: v for n, v in given.items() if n in _FREE}}
            for name, value in given.items():
                if name not in _FREE and value != fixed[name]:
                    raise ValueError(
                        f"{name}={value} contradicts pretrained={pretrained!r}, which has "
                        f"{fixed[name]}: leave it out"
                    )
            defaults = inspect.signature(MoEEstimator.__init__).parameters
            for name in ("distr_output", "scaling"):
                value = shared[name]  # type: ignore[literal-required]
                resolved = resolve_head(value) if name == "distr_output" else value
                # Heads are equal that are written in the same way.
                if value != defaults[name].default and repr(resolved) != repr(fixed[name]):
                    raise ValueError(
                        f"{name}={value!r} contradicts pretrained={pretrained!r}, which brings "
                        "its own: leave it out"
                    )
                shared[name] = fixed[name]  # type: ignore[literal-required]
            if context_length is None and freq is not None:
                context_length = default_context_length(freq, prediction_length)
            sizes = checkpoint.choose_patch_sizes(shared["patch_size"], context_length or 0)
            shared["patch_size"] = list(sizes)
        super().__init__(freq, prediction_length, context_length, **shared)
        if checkpoint is None:
            longer = tuple(size for size in self.patch_sizes if size > 1)
            if shared["patch_size"] == "auto" and longer:
                self.patch_sizes = longer
            architecture["trained_patch_sizes"] = self.patch_sizes
            architecture["distr_output"] = self.distr_output
            architecture["scaling"] = self.scaling
        if tuning not in TUNINGS:
            raise ValueError(f"tuning={tuning!r} is unknown: choose one of {', '.join(TUNINGS)}")
        if tuning != "full" and pretrained is None:
            raise ValueError(f"tuning={tuning!r} needs pretrained: other weights mean nothing yet")
        for name, value in (
            ("num_tuned_layers", num_tuned_layers),
            ("rank", rank),
            ("num_samples", num_samples),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.checkpoint = checkpoint
        self.num_samples = num_samples
        self.tuning = tuning
        self.num_tuned_layers = num_tuned_layers
        self.rank = rank
        self.tune_routers = checkpoint is None if tune_routers is None else tune_routers
        self.network_config = MoiraiMoEConfig(
            window=self.window,
            patch_sizes=self.patch_sizes,
            decoding=decoding,
            gradient_checkpointing=gradient_checkpointing,
            backend=self.backend,
            **architecture,
        )
        if self.calibration_windows and any(
            self.network_config.num_future_patches(size) > 1 for size in self.patch_sizes
        ):
            raise ValueError(
                f"calibration_windows={self.calibration_windows} needs forecasts that are "
                "distributions, but horizons of several patches are drawn as paths: set it to 0"
            )

    def create_network(self) -> MoiraiMoENetwork:
        network = MoiraiMoENetwork(self.network_config)
        if self.checkpoint is not None:
            self.checkpoint.load_into(network)
        return network

    def prepare_training(self, network: ForecastNetwork) -> None:
        assert isinstance(network, MoiraiMoENetwork)
        prepare_tuning(network, self.tuning, self.num_tuned_layers, self.rank, self.tune_routers)

    def finish_training(self, network: ForecastNetwork) -> None:
        assert isinstance(network, MoiraiMoENetwork)
        finish_tuning(network)

    def predictor_settings(self) -> Dict[str, Any]:
        return {"num_samples": self.num_samples}
