"""`moecast train MODEL`: a file of series in, a model folder out."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, List, Optional

import typer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from ...backends import BackendUnavailableError
from ...distributions import support_of
from ...forecasters import MoEEstimator, MoEPredictor
from ..datasets import Entry
from ..errors import EvaluationError
from ..specs import dimensions
from ..tables import suggestion
from .console import (
    command_line,
    errors_as_sentences,
    folder_written_whole,
    register_parameters,
    say,
    sentences_from,
)
from .model_folder import MODELS, Record, check_entries
from .progress import TrainingProgress
from .signatures import estimator_parameters
from .sources import DataOptions, Source, read_source

_PANEL = "Training"
# The last is what Lightning says of an accelerator that is not there.
_ABOUT_INPUT = (ValueError, MisconfigurationException)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of every model's training that its constructor does not have."""

    out: Annotated[
        Path, typer.Option("--out", help="Folder to write the model into.", rich_help_panel=_PANEL)
    ]
    holdout: Annotated[
        int,
        typer.Option(
            "--holdout",
            min=0,
            help="Windows of the horizon at the end of each series to leave out of training, for "
            "`moecast evaluate` to forecast.",
            rich_help_panel=_PANEL,
        ),
    ] = 0
    epochs: Annotated[
        Optional[int],
        typer.Option("--epochs", min=1, help="Epochs (100).", rich_help_panel=_PANEL),
    ] = None
    max_steps: Annotated[
        Optional[int],
        typer.Option(
            "--max-steps", min=1, help="Stop after this many batches.", rich_help_panel=_PANEL
        ),
    ] = None
    accelerator: Annotated[
        str,
        typer.Option("--accelerator", help="Lightning's: auto, cpu, gpu.", rich_help_panel=_PANEL),
    ] = "auto"
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a training of --out that was stopped; give the same options.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a model, or the remains of a stopped training, at --out.",
            rich_help_panel=_PANEL,
        ),
    ] = False


def register(app: typer.Typer) -> None:
    """Add the command, with a command of its own for every model, to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Train a model and write it into a folder.")
    for model, cls in MODELS.items():
        _register_model(group, model, cls)
    app.add_typer(group, name="train")


def _register_model(group: typer.Typer, model: str, cls: type[MoEEstimator]) -> None:
    own = estimator_parameters(cls)
    groups: tuple[Any, ...] = (DataOptions, TrainOptions)

    def run(**arguments: Any) -> None:
        with errors_as_sentences():
            data, training = (
                group(**{f.name: arguments.pop(f.name) for f in dataclasses.fields(group)})
                for group in groups
            )
            train_model(model, cls, data, training, arguments)

    run.__doc__ = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
    parameters = [
        parameter
        for group in groups
        for parameter in inspect.signature(group, eval_str=True).parameters.values()
    ]
    by_name = {parameter.name: parameter for parameter in own}
    # A known data set has a usual horizon, so that it need not be given.
    horizon = by_name["prediction_length"]
    annotation = horizon.annotation
    by_name["prediction_length"] = horizon.replace(
        annotation=Annotated[Optional[int], annotation.__metadata__[0]], default=None
    )
    register_parameters(group, model, run, [*parameters, *by_name.values()])


def train_model(
    model: str,
    cls: type[MoEEstimator],
    data: DataOptions,
    options: TrainOptions,
    settings: dict[str, Any],
) -> None:
    """Train `cls` with its constructor's `settings`, and write the model folder.

    Raises
    ------
    EvaluationError
        The options or data cannot be used, or there is something at --out already.
    """
    checkpoints = options.out.with_name(f"{options.out.name}.training")
    resume_from = _check_out(options, checkpoints)
    source = read_source(data)
    if settings["prediction_length"] is None:
        settings["prediction_length"] = source.prediction_length
    if settings["prediction_length"] is None:
        raise EvaluationError("--prediction-length is missing: the number of steps to forecast.")
    horizon = settings["prediction_length"]
    training = leave_out(source.entries, options.holdout * horizon, horizon)
    progress = TrainingProgress()
    arguments = {
        **settings,
        "freq": source.settings.freq,
        **dimensions(source.entries),
        "trainer_kwargs": _trainer_kwargs(options, settings, checkpoints, progress),
    }
    refusals = ValueError, TypeError, BackendUnavailableError
    with sentences_from(*refusals, before=f"{model} cannot be made: "):
        estimator = cls(**arguments)
    support = support_of(estimator.distr_output)
    check_entries(training, estimator.window, support, source.name, forecast=False)
    _check_lengths(training, estimator.window.future_length, options.holdout)

    _say_what(model, source, training, horizon, options)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    started = time.perf_counter()
    predictor = _train(estimator, training, resume_from, checkpoints, progress)
    seconds = time.perf_counter() - started
    record = Record(
        model=model,
        reading=source.settings,
        trained_until={str(e["item_id"]): str(_last_period(e)) for e in training},
        holdout=options.holdout,
        settings={k: v for k, v in arguments.items() if v is not None and k != "trainer_kwargs"},
        command=command_line(),
        files=source.files,
        training={
            "seconds": round(seconds, 3),
            "steps": progress.steps,
            "loss": progress.losses,
        },
    )
    with folder_written_whole(options.out) as folder:
        predictor.serialize(folder)
        record.write(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    loss = f", loss {progress.losses[-1]:.4g}" if progress.losses else ""
    say(f"trained {progress.steps} steps in {seconds:.1f} s{loss}; wrote {options.out}")


def leave_out(entries: List[Entry], steps: int, horizon: int) -> List[Entry]:
    """Entries without the last `steps` of their targets and of what lies beside these.

    Raises
    ------
    EvaluationError
        A series has no more than `steps` values.
    """
    if steps == 0:
        return entries
    shortened = []
    for entry in entries:
        length = entry["target"].shape[-1]
        if length <= steps:
            raise EvaluationError(
                f"item {entry['item_id']!r} has {length} values, of which --holdout takes {steps}; "
                f"hold out fewer windows of {horizon} steps, or leave the item out."
            )
        short = {**entry, "target": entry["target"][..., : length - steps]}
        for name in ("feat_dynamic_real", "past_feat_dynamic_real"):
            if name in entry:
                short[name] = entry[name][:, : length - steps]
        shortened.append(short)
    return shortened


def _check_out(options: TrainOptions, checkpoints: Path) -> Optional[str]:
    """The checkpoint to go on from; refuses to replace what was not meant to be replaced."""
    if options.out.exists() and not options.overwrite:
        raise EvaluationError(
            f"{options.out}: there is something already; give another --out, or --overwrite."
        )
    candidates = [
        checkpoints / "checkpoints" / "last.ckpt",
        checkpoints / "calibration" / "checkpoints" / "last.ckpt",
    ]
    found = next((path for path in candidates if path.exists()), None)
    if options.resume:
        if found is None:
            raise EvaluationError(
                f"--resume: there is no stopped training at {checkpoints}; leave --resume out to "
                "begin one."
            )
        return str(found)
    if found is not None and not options.overwrite:
        raise EvaluationError(
            f"{checkpoints}: a training of {options.out.name} was stopped here; go on with "
            "--resume, or begin anew with --overwrite."
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return None


def _trainer_kwargs(
    options: TrainOptions,
    settings: dict[str, Any],
    checkpoints: Path,
    progress: TrainingProgress,
) -> dict[str, Any]:
    ends = {"max_epochs": options.epochs, "max_steps": options.max_steps}
    given = settings.get("trainer_kwargs") or {}
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    for name in given:
        if name not in known:
            raise EvaluationError(f"--trainer-kwargs {name!r}: {suggestion(name, known)}.")
    return {
        "default_root_dir": str(checkpoints),
        "accelerator": options.accelerator,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [progress],
        **{name: value for name, value in ends.items() if value is not None},
        **given,
    }


def _check_lengths(entries: List[Entry], future_length: int, holdout: int) -> None:
    longest = max(entry["target"].shape[-1] for entry in entries)
    if longest <= future_length:
        held = " after --holdout" if holdout else ""
        raise EvaluationError(
            f"the longest series has {longest} values{held}, but a window needs more than the "
            f"{future_length} steps of --prediction-length (and --lead-time); ask for a shorter "
            "horizon or give more data."
        )


def _say_what(
    model: str, source: Source, training: List[Entry], horizon: int, options: TrainOptions
) -> None:
    steps = sum(entry["target"].shape[-1] for entry in training)
    held = f", the last {options.holdout} windows of {horizon} left out" if options.holdout else ""
    say(
        f"{source.name}: {len(training)} series, {steps:,} steps of freq={source.settings.freq}"
        f"{held}; training {model} to forecast {horizon} steps …"
    )


def _train(
    estimator: MoEEstimator,
    training: List[Entry],
    resume_from: Optional[str],
    checkpoints: Path,
    progress: TrainingProgress,
) -> MoEPredictor:
    arguments = {} if resume_from is None else {"ckpt_path": resume_from}
    try:
        return estimator.train(training, **arguments)
    except BaseException as error:
        if not any(checkpoints.rglob("last.ckpt")):
            shutil.rmtree(checkpoints, ignore_errors=True)
        elif progress.steps:
            say("training stopped; the same command with --resume goes on")
        if isinstance(error, SystemExit) and not error.code:
            # What Lightning makes of SIGTERM; no script is to take it for a success.
            raise typer.Exit(1) from error
        # Data and settings are checked before the first step; what fails later is a fault.
        about_input = isinstance(error, _ABOUT_INPUT) and not progress.steps
        with sentences_from(*(_ABOUT_INPUT if about_input else ())):
            raise


def _last_period(entry: Entry) -> Any:
    return entry["start"] + entry["target"].shape[-1] - 1
