"""`moecast backtest | long-horizon`: any forecaster by its class path, over rolling windows."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Iterator, List, Optional

import numpy as np
import torch
import typer
from gluonts.dataset.field_names import FieldName

from ..backtest import BacktestResult, backtest, long_horizon, season_length
from ..gift_eval import write_gift_eval
from ..long_horizon_data import load_long_horizon
from ..plots import plot_forecasts, require_matplotlib
from ..report import results_table, write_results
from ..specs import ForecasterSpec, dimensions, parse_forecasters
from .console import command, say, show
from .sources import DataFormat, DataOptions, ReadSettings, read_source

Forecasters = Annotated[
    List[str],
    typer.Option(
        "--forecaster",
        metavar="[NAME=]CLASS",
        help="Class path, such as gluonts.torch.DLinearEstimator; may be repeated.",
    ),
]
Settings = Annotated[
    Optional[List[str]],
    typer.Option(
        "--set",
        metavar="[NAME.]PARAMETER=VALUE",
        help="Constructor argument, JSON where it parses; may be repeated. Without NAME it goes to "
        "every forecaster that takes it.",
    ),
]
Freq = Annotated[
    Optional[str],
    typer.Option(help="pandas frequency, for files without times of their own; else inferred."),
]
Multivariate = Annotated[
    bool, typer.Option("--multivariate", help="One series with all columns as channels.")
]
Seed = Annotated[int, typer.Option(help="Seed of NumPy's and torch's random numbers.")]
Out = Annotated[Optional[Path], typer.Option(help="Folder for the result files.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "backtest")
    def backtest_command(
        forecaster: Forecasters,
        prediction_length: Annotated[int, typer.Option(help="Steps to forecast.")],
        data: DataOptions,
        set_: Settings = None,
        windows: Annotated[
            Optional[int],
            typer.Option(help="Test windows per series; by default GIFT-Eval's rule."),
        ] = None,
        distance: Annotated[
            Optional[int], typer.Option(help="Steps between windows; by default the horizon.")
        ] = None,
        context_length: Annotated[
            Optional[int], typer.Option(help="For forecasters that take it.")
        ] = None,
        seasonality: Annotated[
            Optional[int], typer.Option(help="Steps per season; by default from the frequency.")
        ] = None,
        validate: Annotated[
            bool,
            typer.Option("--validate", help="Hold one horizon out of training to validate on."),
        ] = False,
        batch_size: Annotated[int, typer.Option(help="Windows scored at a time.")] = 512,
        name: Annotated[
            Optional[str], typer.Option(help="Name of the data set; by default the file's.")
        ] = None,
        domain: Annotated[str, typer.Option(help="GIFT-Eval's domain, such as Energy.")] = "",
        plot: Annotated[Optional[Path], typer.Option(help="File for a plot of forecasts.")] = None,
        seed: Seed = 0,
        out: Out = None,
    ) -> None:
        """Train, forecast rolling windows at the end of each series, score by GIFT-Eval's metrics.

        Files are read as wide unless --format says otherwise. Writes all_results.csv and
        config.json into OUT, for several forecasters in a folder each.
        """
        with session(forecaster, set_) as (specs, trainer_kwargs):
            if plot is not None:
                require_matplotlib()
            source = read_source(data, ReadSettings(format=DataFormat.WIDE))
            dataset = source.entries
            start = dataset[0][FieldName.START]
            results = []
            for spec in specs:
                seed_all(seed)
                built = spec.build(
                    freq=start.freqstr,
                    prediction_length=prediction_length,
                    context_length=context_length,
                    season_length=season_length(start) if seasonality is None else seasonality,
                    trainer_kwargs=trainer_kwargs,
                    **dimensions(dataset),
                )
                say(f"{spec.name} …")
                result = backtest(
                    built,
                    dataset,
                    prediction_length=prediction_length,
                    windows=windows,
                    distance=distance,
                    seasonality=seasonality,
                    validate=validate,
                    batch_size=batch_size,
                    keep_forecasts=plot is not None,
                    dataset_name=source.name if name is None else name,
                    model=spec.name,
                )
                results.append(result)
            show(results_table(results))
            if plot is not None:
                forecasts = {result.model: result.forecasts or () for result in results}
                plot_forecasts(forecasts, results[0].test_data, path=plot)
            if out is not None:
                for folder in write_gift_eval(results, out, domain=domain):
                    say(f"wrote {folder / 'all_results.csv'} and config.json")

    @command(app, "long-horizon")
    def long_horizon_command(
        data: Annotated[Path, typer.Option("--data", help="The data file, wide.")],
        forecaster: Forecasters,
        prediction_length: Annotated[
            List[int], typer.Option(help="Steps to forecast; may be repeated.")
        ],
        set_: Settings = None,
        context_length: Annotated[
            int, typer.Option(help="Steps seen before each window, also by the constructor.")
        ] = 336,
        freq: Freq = None,
        timestamp: Annotated[str, typer.Option(help="Name of the column of timestamps.")] = "date",
        split: Annotated[
            str, typer.Option(help="ett (12, 4, 4 months), ratio (70, 10, 20 %) or auto.")
        ] = "auto",
        as_published: Annotated[
            bool,
            typer.Option(
                "--as-published",
                help="Take -9999 as a measurement and all rows as evenly spaced, as the papers do.",
            ),
        ] = False,
        stride: Annotated[int, typer.Option(help="Steps between windows.")] = 1,
        multivariate: Multivariate = False,
        batch_size: Annotated[int, typer.Option(help="Windows scored at a time.")] = 256,
        seed: Seed = 0,
        out: Out = None,
    ) -> None:
        """Score every window of the test part on the standardised scale, as long-horizon papers do.

        Writes results.csv and results.md into OUT.
        """
        with session(forecaster, set_) as (specs, trainer_kwargs):
            as_is: dict[str, Any] = (
                {"missing_values": (), "irregular": "keep"} if as_published else {}
            )
            dataset = load_long_horizon(
                data,
                split=split,  # type: ignore[arg-type]
                freq=freq,
                timestamp=timestamp,
                **as_is,
            )
            results: List[BacktestResult] = []
            for horizon in prediction_length:
                dataset.test_windows(horizon, context_length, stride=stride)
                for spec in specs:
                    seed_all(seed)
                    built = spec.build(
                        freq=dataset.freq,
                        prediction_length=horizon,
                        context_length=context_length,
                        season_length=season_length(dataset.start),
                        trainer_kwargs=trainer_kwargs,
                        **dimensions(dataset.training_entries(multivariate=multivariate)),
                    )
                    say(f"{spec.name}, {horizon} steps …")
                    result = long_horizon(
                        built,
                        dataset,
                        prediction_length=horizon,
                        context_length=context_length,
                        multivariate=multivariate,
                        stride=stride,
                        batch_size=batch_size,
                        model=spec.name,
                    )
                    results.append(result)
            show(results_table(results))
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                for file in ("results.csv", "results.md"):
                    write_results(results, out / file)
                    say(f"wrote {out / file}")


@contextmanager
def session(
    paths: List[str], assignments: Optional[List[str]]
) -> Iterator[tuple[List[ForecasterSpec], dict[str, Any]]]:
    """Give the forecasters asked for, and Lightning settings for those that train.

    The settings keep checkpoints out of the working folder and the output short.
    """
    specs = parse_forecasters(paths, assignments or [])
    # Lightning sets its log level when it is imported, which the forecasters do.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    with tempfile.TemporaryDirectory(prefix="moecast-") as folder:
        yield (
            specs,
            {
                "default_root_dir": folder,
                "logger": False,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stderr.isatty(),
            },
        )


def seed_all(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002  GluonTS samples from the global generator
    torch.manual_seed(seed)
