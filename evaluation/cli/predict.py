"""`moecast predict MODEL_DIR`: the forecasts of a saved model as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Iterable, Iterator, Optional

import typer
from gluonts.model.forecast import Forecast

from ..errors import EvaluationError
from ..frames import forecasts_to_frame
from .console import check_table_path, command, frame_table, say, show, write_table
from .model_folder import Device, ModelDir, load_model
from .progress import progress_bar
from .sources import DataFormat, DataOptions, read_source

_ROWS_SHOWN = 10


def parse_quantiles(text: str) -> list[float]:
    """Levels from `0.1,0.5,0.9`.

    Raises
    ------
    EvaluationError
        One is no number between 0 and 1.
    """
    levels = []
    for part in text.split(","):
        try:
            level = float(part)
        except ValueError:
            level = float("nan")
        if not 0 < level < 1:
            raise EvaluationError(
                f"--quantiles {text!r}: {part.strip()!r} is no number between 0 and 1; write them "
                "as 0.1,0.5,0.9."
            )
        levels.append(level)
    return levels


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "predict")
    def predict_command(
        model_dir: ModelDir,
        data: DataOptions,
        out: Annotated[
            Optional[Path],
            typer.Option("--out", help="File for the forecasts: .csv, .jsonl or .parquet."),
        ] = None,
        quantiles: Annotated[
            str, typer.Option("--quantiles", help="Levels, with commas.")
        ] = "0.1,0.5,0.9",
        num_samples: Annotated[
            Optional[int],
            typer.Option(
                "--num-samples", min=1, help="Paths, of forecasts that are made of paths."
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
        device: Device = None,
    ) -> None:
        """Forecast what follows each series, as rows of item, timestamp, mean and quantiles.

        A forecast begins after the last row that has a target; rows behind it give the covariates
        that are known ahead. The columns are read as in training unless options say otherwise.
        """
        import torch

        levels = parse_quantiles(quantiles)
        if out is not None:
            check_table_path(out)
        model = load_model(model_dir, device)
        source = read_source(data, model.reading)
        model.check(source.entries, source.name, forecast=True)
        torch.manual_seed(seed)
        forecasts = model.predictor.predict(source.entries, num_samples=num_samples)
        names: dict[str, Any] = {}
        if source.settings.format is DataFormat.LONG:
            names["item_id"] = source.settings.item_id or "item_id"
            names["timestamp"] = source.settings.timestamp or "timestamp"
        frame = forecasts_to_frame(
            _shown(forecasts, len(source.entries)), levels, stamp=source.stamp, **names
        )
        if out is None:
            show(frame_table(frame.head(_ROWS_SHOWN)))
            if len(frame) > _ROWS_SHOWN:
                say(f"{len(frame)} rows; --out FILE writes all")
            return
        write_table(frame, out)
        say(f"{len(source.entries)} series, {model.window.prediction_length} steps; wrote {out}")


def _shown(forecasts: Iterable[Forecast], count: int) -> Iterator[Forecast]:
    with progress_bar("series") as progress:
        yield from progress.track(forecasts, total=count, description="forecasting")
