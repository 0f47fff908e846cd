"""What every command does alike: speaks, reports errors, takes groups of options, writes whole."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import pandas as pd
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DataWarning, EvaluationError

_FILE_WIDTH = 160
TABLE_FORMATS = (".csv", ".json", ".jsonl", ".parquet")


def say(text: str) -> None:
    """Print a line about what goes on to standard error."""
    Console(stderr=True, soft_wrap=True).print(escape(text), style="dim")


def show(*renderables: Any) -> None:
    """Print results to standard output, wide where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for renderable in renderables:
        console.print(renderable)


def frame_table(frame: pd.DataFrame, digits: int = 4) -> Table:
    """A `rich` table of a frame; numbers are rounded to `digits` significant digits."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name, column in frame.items():
        number = pd.api.types.is_numeric_dtype(column)
        table.add_column(escape(str(name)), justify="right" if number else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        cells = [f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in row]
        table.add_row(*map(escape, cells))
    return table


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[..., Callable[..., None]]:
    """Register a command: its groups of options are expanded, and its errors are sentences.

    A parameter whose annotation is a dataclass stands for an option per field, whose annotations
    are typer's. An `EvaluationError` is printed as one sentence and exits with 2, other exceptions
    keep their traceback and exit with 1; a `DataWarning` is printed as a note.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        groups: dict[str, Any] = {
            parameter.name: parameter.annotation
            for parameter in signature.parameters.values()
            if dataclasses.is_dataclass(parameter.annotation)
        }

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            for group_name, group in groups.items():
                names = [field.name for field in dataclasses.fields(group)]
                arguments[group_name] = group(**{key: arguments.pop(key) for key in names})
            with errors_as_sentences():
                function(**arguments)

        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name in groups:
                fields = inspect.signature(parameter.annotation, eval_str=True).parameters
                parameters.extend(fields.values())
            else:
                parameters.append(parameter)
        return register_parameters(app, name, run, parameters, **settings)

    return register


def register_parameters(
    app: typer.Typer,
    name: str,
    run: Callable[..., None],
    parameters: list[inspect.Parameter],
    **settings: Any,
) -> Callable[..., None]:
    """Register `run` as a command that takes `parameters` by keyword."""
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    app.command(name, **settings)(run)
    return run


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an `EvaluationError` as one sentence and exit with 2; print notes on repaired data."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        shown = warnings.showwarning

        def show_note(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if issubclass(category, DataWarning):
                say(f"note: {message}")
            else:
                shown(message, category, *place, **more)

        warnings.showwarning = show_note
        try:
            yield
        except EvaluationError as error:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(2) from error


@contextmanager
def sentences_from(*kinds: type[Exception], before: str = "") -> Iterator[None]:
    """Turn exceptions that are about the user's input into an `EvaluationError`."""
    try:
        yield
    except EvaluationError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        end = "" if reason.endswith(".") else "."
        raise EvaluationError(f"{before}{reason}{end}") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, which takes its place when the block ends well."""
    if path.is_dir():
        raise EvaluationError(f"{path}: there is a folder of this name; give a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp's files are their owner's alone; results are as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        inside = temporary / "new"
        inside.mkdir()
        yield inside
        if path.exists():
            path.rename(temporary / "old")
        inside.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_table_path(path: Path) -> None:
    """Refuse a table's file whose ending is unknown, or Parquet without pyarrow.

    Raises
    ------
    EvaluationError
        As said.
    """
    if path.suffix not in TABLE_FORMATS:
        raise EvaluationError(
            f"{path.name}: a table is written as {', '.join(TABLE_FORMATS)}; rename the file."
        )
    if path.suffix == ".parquet":
        require_pyarrow(path)


def require_pyarrow(path: Path) -> None:
    """Raise an `EvaluationError` if Parquet cannot be read and written here."""
    if importlib.util.find_spec("pyarrow") is None:
        raise EvaluationError(
            f"{path.name}: Parquet needs pyarrow, which is not installed; pip install pyarrow, or "
            "use CSV or JSON lines."
        )


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as CSV, JSON (lines) or Parquet by `path`'s ending, whole or not at all."""
    check_table_path(path)
    with written_whole(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False)
        elif path.suffix in (".json", ".jsonl"):
            lines = path.suffix == ".jsonl"
            frame.to_json(temporary, orient="records", lines=lines, date_format="iso")
        else:
            frame.to_parquet(temporary, index=False)


def command_line() -> str:
    """The command as it was typed, for results to name it."""
    return shlex.join(["moecast", *sys.argv[1:]])
