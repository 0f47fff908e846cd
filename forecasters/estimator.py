"""What every estimator shares: settings, training, resuming, calibration."""

import contextlib
import functools
import inspect
import logging
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Tuple,
    Type,
    TypedDict,
    Union,
)

import lightning.pytorch as pl
import numpy as np
import torch
from gluonts.core.component import validated
from gluonts.dataset.common import DataEntry, Dataset
from gluonts.dataset.field_names import FieldName
from gluonts.time_feature import get_seasonality
from gluonts.torch.distributions import Output
from gluonts.torch.model.estimator import PyTorchLightningEstimator, TrainOutput
from gluonts.transform import Identity
from gluonts.transform.sampler import InstanceSampler
from lightning.pytorch.callbacks import EarlyStopping

from ..backends import get_backend
from ..distributions import has_cdf, resolve_head, support_of
from .calibration import Calibration, calibrate, held_out_windows
from .checkpoints import CALIBRATION, EpochCheckpoint, is_calibration_checkpoint
from .fields import (
    FEAT_DYNAMIC_REAL,
    FEAT_STATIC_CAT,
    FEAT_STATIC_REAL,
    PAST_FEAT_DYNAMIC_REAL,
    TARGET,
    WindowConfig,
)
from .frequencies import granularity, parse_frequency
from .lightning_module import ForecastModule, OptimizerConfig
from .network import ForecastNetwork, resolve_scaling
from .patching import resolve_patch_sizes
from .predictor import MoEPredictor
from .serialization import load_matching
from .windows import TrainingWindows, ValidationWindows

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.25

# Warnings of Lightning's that nobody who trains with us can act on.
_NOT_FOR_USERS = (
    "You defined a `validation_step` but have no `val_dataloader`",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class SharedSettings(TypedDict, total=False):
    """The settings of :class:`MoEEstimator`, for those who read a model's signature."""

    lead_time: int
    target_dim: int
    num_feat_dynamic_real: int
    num_past_feat_dynamic_real: int
    num_feat_static_real: int
    num_feat_static_cat: int
    cardinality: Optional[List[int]]
    distr_output: Union[Output, str]
    scaling: Optional[str]
    patch_size: Union[int, str, List[int]]
    lr: float
    weight_decay: float
    lr_schedule: str
    aux_weight: float
    batch_size: int
    num_batches_per_epoch: int
    early_stopping_patience: Optional[int]
    calibration_windows: int
    train_sampler: Optional[InstanceSampler]
    validation_sampler: Optional[InstanceSampler]
    trainer_kwargs: Optional[Dict[str, Any]]
    max_dataset_bytes: Optional[int]
    seed: Optional[int]
    backend: str


class MoEEstimator(PyTorchLightningEstimator):
    """Base of the estimators: everything but the network.

    A model's estimator declares its own settings, passes the shared ones on, and implements
    :meth:`create_network`.

    Parameters
    ----------
    freq
        Frequency of the series, a pandas alias, old or new. ``None`` takes series of any, together
        too, whose start is a period; ``context_length`` and ``patch_size`` must then be numbers.
    prediction_length
        Number of steps to forecast.
    context_length
        Number of steps the network reads (default: four horizons, and at least two seasons).
    lead_time
        Number of steps between the end of the context and the first step to forecast.
    target_dim
        Number of channels of a multivariate target ``[channel, time]``; 1 for univariate series.
    num_feat_dynamic_real
        Number of covariates known in advance.
    num_past_feat_dynamic_real
        Number of covariates known up to the present.
    num_feat_static_real
        Number of real static features.
    num_feat_static_cat, cardinality
        Number of categorical static features, and how many categories each has.
    distr_output
        The distribution head: any GluonTS ``Output``, a short name, or a class path.
    scaling
        ``"std"``, ``"mean"`` or ``"none"``; ``"auto"`` takes what the head's support allows.
    patch_size
        Steps per patch. A list, or ``"auto"`` for the frequency's: the network learns several
        sizes and each series is forecast with the one that best forecasts the end of its history.
    lr, weight_decay
        Of AdamW; biases do not decay.
    lr_schedule
        ``"one_cycle"``, ``"constant"``, or ``"halving"`` (after each epoch).
    aux_weight
        Weight of the balance loss of sparse routers.
    batch_size
        Windows per training batch, and series per prediction batch.
    num_batches_per_epoch
        Batches per epoch.
    early_stopping_patience
        Stop after this many epochs without improvement; ``None`` trains to the end.
    calibration_windows
        Calibrate the forecasts' quantiles on this many windows at the end of each series. The
        network is then trained twice, first without these windows to see how often its intervals
        cover them, then on everything. 0 leaves the quantiles as the head has them.
    train_sampler, validation_sampler
        GluonTS samplers of windows. By default, training draws among all windows with a full
        context, from each series equally often, and validation takes the last window of each.
    trainer_kwargs
        For Lightning's ``Trainer`` (default: 100 epochs, gradients clipped at norm 10).
        Checkpoints go to ``default_root_dir`` if that is given, and are otherwise removed after
        a training that succeeded.
    max_dataset_bytes
        A dataset larger than this is streamed (default: a quarter of the machine's memory).
    seed
        Makes training reproducible whatever the state of the global generators; ``None`` lets
        ``torch.manual_seed`` decide.
    backend
        Computes routers and experts of forecasts; see :func:`moecast.backends.get_backend`.
        Training is torch's.

    Raises
    ------
    ValueError
        If a setting is out of range or unknown.
    """

    predictor_class: Type[MoEPredictor] = MoEPredictor

    def __init__(
        self,
        freq: Optional[str],
        prediction_length: int,
        context_length: Optional[int] = None,
        lead_time: int = 0,
        target_dim: int = 1,
        num_feat_dynamic_real: int = 0,
        num_past_feat_dynamic_real: int = 0,
        num_feat_static_real: int = 0,
        num_feat_static_cat: int = 0,
        cardinality: Optional[List[int]] = None,
        distr_output: Union[Output, str] = "student_t",
        scaling: Optional[str] = "auto",
        patch_size: Union[int, str, List[int]] = 1,
        lr: float = 2e-3,
        weight_decay: float = 1.0,
        lr_schedule: str = "one_cycle",
        aux_weight: float = 0.01,
        batch_size: int = 32,
        num_batches_per_epoch: int = 50,
        early_stopping_patience: Optional[int] = None,
        calibration_windows: int = 0,
        train_sampler: Optional[InstanceSampler] = None,
        validation_sampler: Optional[InstanceSampler] = None,
        trainer_kwargs: Optional[Dict[str, Any]] = None,
        max_dataset_bytes: Optional[int] = None,
        seed: Optional[int] = None,
        backend: str = "auto",
    ) -> None:
        if calibration_windows < 0:
            raise ValueError(f"calibration_windows={calibration_windows} must not be negative")
        for name, value in (
            ("batch_size", batch_size),
            ("num_batches_per_epoch", num_batches_per_epoch),
            ("early_stopping_patience", early_stopping_patience),
            ("max_dataset_bytes", max_dataset_bytes),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        cardinality = list(cardinality or [])
        if num_feat_static_cat not in (0, len(cardinality)):
            raise ValueError(
                f"num_feat_static_cat={num_feat_static_cat} needs as many numbers in "
                f"cardinality, which is {cardinality}"
            )
        if context_length is None:
            if freq is None:
                raise ValueError("freq=None tells no context_length: give it as a number")
            context_length = default_context_length(freq, prediction_length)
        self.window = WindowConfig(
            freq=freq,
            prediction_length=prediction_length,
            context_length=context_length,
            lead_time=lead_time,
            target_dim=target_dim,
            num_feat_dynamic_real=num_feat_dynamic_real,
            num_past_feat_dynamic_real=num_past_feat_dynamic_real,
            num_feat_static_real=num_feat_static_real,
            cardinality=tuple(cardinality),
        )
        trainer_kwargs = trainer_kwargs or {}
        ends_otherwise = "max_steps" in trainer_kwargs or "max_time" in trainer_kwargs
        default_trainer_kwargs = {
            "max_epochs": -1 if ends_otherwise else 100,
            "gradient_clip_val": 10.0,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        super().__init__(
            trainer_kwargs={**default_trainer_kwargs, **trainer_kwargs}, lead_time=lead_time
        )
        self.prediction_length = prediction_length
        self.context_length = context_length
        self.distr_output = resolve_head(distr_output)
        self.scaling = resolve_scaling(scaling, self.distr_output)
        self.patch_sizes = resolve_patch_sizes(patch_size, freq, context_length)
        self.optimizer_config = OptimizerConfig(lr, weight_decay, lr_schedule, aux_weight)
        self.batch_size = batch_size
        self.num_batches_per_epoch = num_batches_per_epoch
        self.early_stopping_patience = early_stopping_patience
        self.calibration_windows = calibration_windows
        if calibration_windows and not has_cdf(self.distr_output):
            raise ValueError(
                f"calibration_windows={calibration_windows} needs a head with a cumulative "
                f"distribution function, which {type(self.distr_output).__name__} lacks"
            )
        self.train_sampler = train_sampler
        self.validation_sampler = validation_sampler
        self.max_dataset_bytes = max_dataset_bytes or int(_SHARE_OF_MEMORY * _memory_in_bytes())
        self.seed = seed
        get_backend(backend)  # Refuses what is unknown, and what cannot be had.
        self.backend = backend

    @classmethod
    def derive_auto_fields(cls, train_iter: Iterable[DataEntry]) -> Dict[str, Any]:
        """Settings that the training data tell, for those who leave them out."""
        derived: Dict[str, Any] = {}
        largest: Optional[np.ndarray] = None
        for entry in train_iter:
            if not derived:
                derived = _describe(entry)
            if entry.get(FEAT_STATIC_CAT) is not None:
                categories = np.atleast_1d(np.asarray(entry[FEAT_STATIC_CAT], dtype=np.int64))
                largest = categories if largest is None else np.maximum(largest, categories)
        if largest is not None:
            derived["num_feat_static_cat"] = len(largest)
            derived["cardinality"] = [int(category) + 1 for category in largest]
        return derived

    def create_network(self) -> ForecastNetwork:
        """A new network of this estimator's settings."""
        raise NotImplementedError

    def create_lightning_module(self) -> ForecastModule:
        return ForecastModule(self.create_network(), self.optimizer_config)

    def create_transformation(self) -> Identity:
        """Nothing: windows are cut from arrays, see :mod:`moecast.forecasters.series`."""
        return Identity()

    def create_training_data_loader(
        self,
        data: Dataset,
        module: ForecastModule,
        cache_data: bool = False,
        calibration_windows: int = 0,
        **kwargs: Any,
    ) -> TrainingWindows:
        return TrainingWindows(
            data,
            module.network.input_window,
            module.network.input_names,
            batch_size=self.batch_size,
            num_batches=self.num_batches_per_epoch,
            seed=int(torch.randint(2**31, ())),
            sampler=self.train_sampler,
            max_bytes=None if cache_data else self.max_dataset_bytes,
            calibration_windows=calibration_windows,
            support=support_of(self.distr_output),
            shortest_context=module.network.shortest_training_context,
        )

    def create_validation_data_loader(
        self, data: Dataset, module: ForecastModule, **kwargs: Any
    ) -> ValidationWindows:
        return ValidationWindows(
            data,
            module.network.input_window,
            module.network.input_names,
            batch_size=self.batch_size,
            sampler=self.validation_sampler,
            support=support_of(self.distr_output),
        )

    def create_predictor(
        self,
        transformation: Any,
        module: ForecastModule,
        calibration: Optional[Calibration] = None,
    ) -> MoEPredictor:
        return self.predictor_class(
            network=module.network,
            batch_size=self.batch_size,
            calibration=calibration,
            **self.predictor_settings(),
        )

    def predictor_settings(self) -> Dict[str, Any]:
        """Further arguments of a model's predictor."""
        return {}

    def prepare_training(self, network: ForecastNetwork) -> None:
        """Make a network, its first weights loaded, ready to be trained; by default it is."""

    def finish_training(self, network: ForecastNetwork) -> None:
        """Undo what :meth:`prepare_training` did, but for the weights."""

    def train_model(
        self,
        training_data: Dataset,
        validation_data: Optional[Dataset] = None,
        from_predictor: Optional[MoEPredictor] = None,
        shuffle_buffer_length: Optional[int] = None,
        cache_data: bool = False,
        ckpt_path: Optional[str] = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, and keep the trainer and the Lightning module beside the predictor.

        Parameters
        ----------
        training_data, validation_data
            The series. With validation data the checkpoint of smallest ``val_loss`` is kept,
            otherwise that of smallest ``train_loss``.
        from_predictor
            Start from this predictor's weights.
        shuffle_buffer_length
            Taken for GluonTS's sake; windows are drawn from all series anyway.
        cache_data
            Keep the dataset in memory however large it is.
        ckpt_path
            Go on from this checkpoint (``checkpoints/last.ckpt`` below ``default_root_dir``; below
            its ``calibration`` folder while a calibrated training is in its first part), with the
            state of optimiser, schedule and random generators.

        Raises
        ------
        ValueError
            If the data do not have the fields that the settings name, or no usable window.
        FileNotFoundError
            If there is no checkpoint at ``ckpt_path``.
        """
        arguments = training_data, validation_data, from_predictor, cache_data
        to_calibrate, to_train = None, ckpt_path
        if ckpt_path is not None and is_calibration_checkpoint(ckpt_path):
            to_calibrate, to_train = ckpt_path, None
        with _seeded(self.seed):
            calibration: Optional[Calibration] = None
            if self.calibration_windows:
                calibration = self._calibrate(*arguments, ckpt_path=to_calibrate)
            module, trainer = self._train_module(*arguments, ckpt_path=to_train)
        return TrainOutput(
            transformation=self.create_transformation(),
            trained_net=module,
            trainer=trainer,
            predictor=self.create_predictor(None, module, calibration),
        )

    def _calibrate(
        self,
        training_data: Dataset,
        validation_data: Optional[Dataset],
        from_predictor: Optional[MoEPredictor],
        cache_data: bool,
        ckpt_path: Optional[str],
    ) -> Optional[Calibration]:
        """Train without the calibration windows, and see how often intervals cover them."""
        held_out = list(held_out_windows(training_data, self.window, self.calibration_windows))
        if not held_out:
            logger.warning(
                "calibration_windows=%d: no series is long enough to hold out a window and still "
                "train on a horizon of others; the forecasts are not calibrated",
                self.calibration_windows,
            )
            return None
        logger.info("Training without the last windows, to calibrate on them")
        module, _ = self._train_module(
            training_data,
            validation_data,
            from_predictor,
            cache_data,
            self.calibration_windows,
            ckpt_path,
        )
        return calibrate(self.create_predictor(None, module), held_out)

    def _train_module(
        self,
        training_data: Dataset,
        validation_data: Optional[Dataset],
        from_predictor: Optional[MoEPredictor],
        cache_data: bool,
        windows: int = 0,
        ckpt_path: Optional[str] = None,
    ) -> Tuple[ForecastModule, pl.Trainer]:
        """Train a network, staying clear of calibration windows."""
        module = self.create_lightning_module()
        training = self.create_training_data_loader(
            training_data, module, cache_data=cache_data, calibration_windows=windows
        )
        validation = None
        if validation_data is not None:
            validation = self.create_validation_data_loader(validation_data, module)
        if from_predictor is None:
            module.network.features.fit(training.first_chunk)
        else:
            weights = from_predictor.network.state_dict()
            load_matching(module.network, weights, "the predictor to train from")
        self.prepare_training(module.network)
        if ckpt_path is not None:
            saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)
            load_matching(module, saved["state_dict"], f"ckpt_path={ckpt_path!r}")
        trainer = self._fit(module, training, validation, ckpt_path)
        self.finish_training(module.network)
        return module.eval(), trainer

    def _fit(
        self,
        module: ForecastModule,
        windows: TrainingWindows,
        validation: Optional[ValidationWindows],
        ckpt_path: Optional[str],
    ) -> pl.Trainer:
        """Fit the module and leave the best checkpoint's weights in it."""
        arguments = dict(self.trainer_kwargs)
        root = arguments.get("default_root_dir")
        if root is None:
            arguments["default_root_dir"] = tempfile.mkdtemp(prefix="moecast-")
            arguments.setdefault("logger", False)
        elif windows.calibration_windows:
            arguments["default_root_dir"] = os.path.join(root, CALIBRATION)
        monitor = "train_loss" if validation is None else "val_loss"
        folder = Path(ckpt_path).parent if ckpt_path else None
        checkpoint = EpochCheckpoint(windows, monitor, folder)
        callbacks: List[pl.Callback] = []
        if arguments.get("enable_checkpointing", True):
            callbacks.append(checkpoint)
        if self.early_stopping_patience is not None:
            callbacks.append(EarlyStopping(monitor, patience=self.early_stopping_patience))
        given = arguments.get("callbacks") or []
        given = [given] if isinstance(given, pl.Callback) else given
        arguments["callbacks"] = [*callbacks, *given]
        trainer = pl.Trainer(**{"accelerator": "auto", **arguments})
        try:
            with _interruptible(), warnings.catch_warnings():
                for message in _NOT_FOR_USERS:
                    warnings.filterwarnings("ignore", message)
                trainer.fit(module, windows, validation, **_resume_arguments(ckpt_path))
        except BaseException:
            if checkpoint.last_model_path:
                logger.error(
                    "Training stopped in epoch %d. Go on from its checkpoint with ckpt_path=%r",
                    trainer.current_epoch,
                    checkpoint.last_model_path,
                )
            raise
        if checkpoint.best_model_path:
            saved = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
            module.load_state_dict(saved["state_dict"])
        if root is None:
            shutil.rmtree(arguments["default_root_dir"], ignore_errors=True)
        return trainer


def takes_shared_settings(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Complete ``__init__(self, …, **shared)`` with :class:`MoEEstimator`'s settings.

    The constructor then validates and converts all of them as GluonTS's ``validated`` does, and
    its signature names them, so that command lines and hyperparameters know each.

    Parameters
    ----------
    **defaults
        Shared settings that this model has another default of.

    Raises
    ------
    TypeError
        If there is no such setting.
    """
    unknown = defaults.keys() - SharedSettings.__annotations__.keys()
    if unknown:
        raise TypeError(f"no shared setting is called {', '.join(sorted(unknown))}")

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(init).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        names = {parameter.name for parameter in own}
        shared = [
            parameter.replace(default=defaults.get(parameter.name, parameter.default))
            for parameter in inspect.signature(MoEEstimator.__init__).parameters.values()
            if parameter.name not in names
        ]

        @functools.wraps(init)
        def complete(self: MoEEstimator, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)

        signature = inspect.Signature([*own, *shared])
        complete.__signature__ = signature  # type: ignore[attr-defined]
        return validated()(complete)

    return decorate


def default_context_length(freq: str, prediction_length: int) -> int:
    """Four horizons, and at least two seasons."""
    daily = granularity(freq) == "day"
    season = 7 if daily else get_seasonality(parse_frequency(freq).freqstr)
    return max(4 * prediction_length, min(2 * season, 1024))


def _describe(entry: DataEntry) -> Dict[str, Any]:
    """The settings that one entry tells."""
    described: Dict[str, Any] = {"target_dim": _num_rows(entry[TARGET])}
    start = entry[FieldName.START]
    if hasattr(start, "freqstr"):
        described["freq"] = start.freqstr
    for name in (FEAT_DYNAMIC_REAL, PAST_FEAT_DYNAMIC_REAL):
        if entry.get(name) is not None:
            described[f"num_{name}"] = _num_rows(entry[name])
    if entry.get(FEAT_STATIC_REAL) is not None:
        described["num_feat_static_real"] = np.size(entry[FEAT_STATIC_REAL])
    return described


def _num_rows(values: Any) -> int:
    shape = np.shape(values)
    return 1 if len(shape) == 1 else shape[0]


def _memory_in_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resume_arguments(ckpt_path: Optional[str]) -> Dict[str, Any]:
    if ckpt_path is None:
        return {}
    arguments: Dict[str, Any] = {"ckpt_path": ckpt_path}
    if "weights_only" in inspect.signature(pl.Trainer.fit).parameters:
        arguments["weights_only"] = True
    return arguments


@contextlib.contextmanager
def _seeded(seed: Optional[int]) -> Iterator[None]:
    """Seeds the global generators within the block, and puts them back after it."""
    if seed is None:
        yield
        return
    numpy_state = np.random.get_state()  # noqa: NPY002 (GluonTS's samplers draw from it)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C reach the caller: Lightning would exit the process and leave the signal off."""
    handlers: List[Tuple[int, Any]] = []
    with contextlib.suppress(ValueError):
        handlers.append((signal.SIGINT, signal.getsignal(signal.SIGINT)))
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            for number, handler in handlers:
                signal.signal(number, handler)
            raise KeyboardInterrupt from None
        raise
