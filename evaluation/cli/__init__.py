"""The command line `moecast`, also `python -m moecast.evaluation`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import backtests, predict, train
from .model_folder import moecast_version

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Probabilistic forecasts with mixtures of experts: train, predict, evaluate.",
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    pass


app.add_typer(train.app, name="train")
predict.register(app)
backtests.register(app)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="moecast")
