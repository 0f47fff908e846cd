"""The command line `moecast`, also `python -m moecast.evaluation`.

Every module below is one command, and is imported when that command is called: some need torch
and Lightning, whose imports take seconds that `--help` and shell completion do not have.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from ..environment import version_of

# The module of each command, and what the overview says of it.
COMMANDS = {
    "train": ("train", "Train a model on a table of series and write it into a folder."),
    "predict": ("predict", "Forecasts of a saved model as a table with quantiles."),
    "evaluate": ("evaluate", "Score saved models and baselines on the same windows."),
    "benchmark": ("benchmark", "Throughput, latency and memory of a saved model."),
    "experts": ("experts", "Which expert is heard, and when."),
    "prune": ("prune", "Leave the experts that are hardly used out of a saved model."),
    "datasets": ("known", "Known data sets: list them, or download one."),
    "backtest": ("backtests", "Train any forecasters and score them by GIFT-Eval's rules."),
    "long-horizon": ("backtests", "Score every test window, as long-horizon papers do."),
}


class CommandsOnDemand(typer.core.TyperGroup):
    """A group that imports a command's module when the command is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            holder = typer.Typer()
            holder.callback()(lambda: None)
            importlib.import_module(f".{COMMANDS[name][0]}", __package__).register(holder)
            command = typer.main.get_group(holder).commands[name]
        return name, command, rest


app = typer.Typer(
    cls=CommandsOnDemand,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Probabilistic forecasts with mixtures of experts.",
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"moecast {version_of('moecast')}")
        raise typer.Exit


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="moecast")
