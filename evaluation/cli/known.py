"""`moecast datasets`: what is known by name, where it is, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import pandas as pd
import typer

from ..known_datasets import (
    DATA_VARIABLE,
    KNOWN_DATASETS,
    KnownDataset,
    data_folders,
    download,
    find_files,
    known_dataset,
    matches_published,
)
from .console import (
    check_table_path,
    command,
    errors_as_sentences,
    frame_table,
    say,
    show,
    write_table,
)

DataDir = Annotated[
    Optional[Path],
    typer.Option("--data-dir", help=f"The folder to look in, instead of ${DATA_VARIABLE}."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    group = typer.Typer(invoke_without_command=True, help="Known data sets: list, or download one.")

    @group.callback()
    def list_command(
        context: typer.Context,
        data_dir: DataDir = None,
        out: Annotated[
            Optional[Path],
            typer.Option("--out", help="File for the list: .csv, .json, .jsonl or .parquet."),
        ] = None,
    ) -> None:
        """List the known data sets: whether they are here, their size, source and licence."""
        if context.invoked_subcommand is not None:
            return
        with errors_as_sentences():
            if out is not None:
                check_table_path(out)
            frame = pd.DataFrame([_describe(known, data_dir) for known in KNOWN_DATASETS.values()])
            show(frame_table(frame))
            say(
                f"looked in {', '.join(map(str, data_folders(data_dir)))}; --data-dir or "
                f"{DATA_VARIABLE} names others"
            )
            if out is not None:
                write_table(frame, out)

    @command(group, "download")
    def download_command(
        name: Annotated[str, typer.Argument(help="Name of the data set.")],
        data_dir: DataDir = None,
    ) -> None:
        """Download a data set into the first folder that is looked in, and check its SHA-256."""
        known = known_dataset(name)
        for path in download(known, data_dir):
            say(f"{path}: {path.stat().st_size:,} bytes, SHA-256 as published")

    app.add_typer(group, name="datasets")


def _describe(known: KnownDataset, data_dir: Optional[Path]) -> dict[str, str]:
    paths = find_files(known, data_dir)
    size = "" if paths is None else f"{sum(p.stat().st_size for p in paths) / 1e6:.1f} MB"
    if any(file.sha256 is None for file in known.files):
        checksum = "unknown"
    elif paths is None:
        checksum = "known"
    else:
        same = all(matches_published(path, file) for path, file in zip(paths, known.files))
        checksum = "as published" if same else "differs"
    return {
        "name": known.name,
        "found": "no" if paths is None else str(paths[0].parent),
        "size": size,
        "SHA-256": checksum,
        "download": "yes" if all(file.url for file in known.files) else "by hand",
        "licence": known.licence,
        "source": known.source,
        "what": known.title,
    }
