"""`moecast experts MODEL_DIR`: which expert is heard, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, List, Optional

import pandas as pd
import typer

from ..errors import EvaluationError
from ..expert_usage import GROUPINGS, draw_windows, expert_shares, specialisation, window_usage
from ..tables import suggestion
from .console import check_table_path, command, frame_table, say, show, write_table
from .model_folder import Device, ModelDir, load_model
from .progress import progress_bar
from .sources import DataOptions, read_source

_GROUPS_SHOWN = 31


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "experts")
    def experts_command(
        model_dir: ModelDir,
        data: DataOptions,
        by: Annotated[
            Optional[List[str]],
            typer.Option(
                "--by",
                help="hour, weekday or month in which a forecast begins, or series; may be "
                "repeated. By default all that the frequency has.",
            ),
        ] = None,
        windows: Annotated[
            int, typer.Option("--windows", min=1, help="Windows drawn from the data.")
        ] = 200,
        out: Annotated[
            Optional[Path],
            typer.Option("--out", help="File for all shares: .csv, .json, .jsonl or .parquet."),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of the windows drawn.")] = 0,
        device: Device = None,
    ) -> None:
        """Usage of each layer's experts, and who is heard at which hour, weekday and series.

        `share` is an expert's mean share in the mixtures, `chosen` the share of tokens that chose
        it. `distance` says how far the mixtures of groups are from the mean mixture: 0 where all
        hear the same experts, at most 1.
        """
        for name in by or []:
            if name not in GROUPINGS:
                raise EvaluationError(f"--by {name!r}: {suggestion(name, GROUPINGS)}.")
        if out is not None:
            check_table_path(out)
        model = load_model(model_dir, device)
        source = read_source(data, model.reading)
        model.check(source.entries, source.name, forecast=False)
        window = model.window
        drawn = draw_windows(
            source.entries, window.future_length, window.context_length, windows, seed
        )
        say(f"{source.name}: {len(drawn)} windows of {len(source.entries)} series …")
        with progress_bar("windows") as progress:
            tracked = progress.track(drawn, description="forecasting")
            found = window_usage(model.predictor, tracked)
        usage = expert_shares(found, drawn)
        groupings = by or _groupings(source.entries[0]["start"], len(source.entries))
        parts = [expert_shares(found, drawn, name) for name in groupings]
        shown = usage.drop(columns=["by", "group", "windows"]).rename(
            columns={"weight_share": "share", "chosen_share": "chosen"}
        )
        show(frame_table(shown, digits=3))
        if parts:
            show(frame_table(specialisation(pd.concat(parts)), digits=3))
        for name, part in zip(groupings, parts):
            favourites = _favourites(part, usage)
            show(frame_table(favourites.rename(columns={"group": name}).head(_GROUPS_SHOWN), 3))
            if len(favourites) > _GROUPS_SHOWN:
                say(f"{len(favourites)} rows by {name}; --out FILE writes all shares")
        if out is not None:
            write_table(pd.concat([usage, *parts]), out)
            say(f"wrote {out}")


def _groupings(start: pd.Period, num_series: int) -> list[str]:
    """The groupings that differ at the frequency of `start`."""
    second = (start + 1).start_time - start.start_time
    names = []
    if second < pd.Timedelta(days=1):
        names.append("hour")
    if second <= pd.Timedelta(days=1):
        names.append("weekday")
    if second < pd.Timedelta(days=80):
        names.append("month")
    return [*names, *(["series"] if num_series > 1 else [])]


def _favourites(part: pd.DataFrame, usage: pd.DataFrame) -> pd.DataFrame:
    """For each group and router the expert whose share is furthest above its overall one."""
    overall = usage.set_index(["router", "expert"])["weight_share"]
    keys = pd.MultiIndex.from_frame(part[["router", "expert"]])
    above = part.assign(above=part["weight_share"].to_numpy() - overall.loc[keys].to_numpy())
    best = above.loc[above.groupby(["group", "router"], sort=False)["above"].idxmax()]
    names = {"weight_share": "share", "above": "above its mean share"}
    return best.rename(columns=names)[["group", "windows", "router", "expert", *names.values()]]
