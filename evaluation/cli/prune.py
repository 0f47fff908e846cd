"""`moecast prune MODEL_DIR`: a saved model without the experts that it hardly uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, List

import pandas as pd
import typer

from ...forecasters import prune_experts
from ..backtest import backtest, season_length
from ..datasets import Entry
from ..errors import EvaluationError
from ..metrics import CRPS
from .backtests import seed_all
from .console import command, folder_written_whole, frame_table, say, sentences_from, show
from .evaluate import without_future
from .model_folder import ModelDir, load_model
from .sources import DataOptions, read_source


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "prune")
    def prune_command(
        model_dir: ModelDir,
        data: DataOptions,
        out: Annotated[Path, typer.Option("--out", help="Folder to write the smaller model into.")],
        least_share: Annotated[
            float,
            typer.Option(
                "--least-share",
                min=0.0,
                max=1.0,
                help="Leave out experts whose mean share in the mixtures is at most this; by "
                "default those that are never chosen.",
            ),
        ] = 0.0,
        windows: Annotated[
            int,
            typer.Option("--windows", min=1, help="Windows at the end of each series to score."),
        ] = 1,
        seed: Annotated[int, typer.Option(help="Seed of NumPy's and torch's numbers.")] = 0,
    ) -> None:
        """Write a model without the experts that its routers hardly use, and score both.

        Which experts are used is seen from forecasts of what precedes the scored windows.
        """
        if least_share == 1.0:
            raise EvaluationError("--least-share 1.0 leaves no expert; give a smaller share.")
        if out.exists():
            raise EvaluationError(f"{out} is there already; give another --out.")
        model = load_model(model_dir)
        source = read_source(data, model.reading)
        model.check(source.entries, source.name, forecast=False)
        horizon = model.window.prediction_length
        entries = without_future(source.entries)
        calibration = _before(entries, windows * horizon, model.window.future_length)
        seed_all(seed)
        with sentences_from(ValueError):
            pruned = prune_experts(model.predictor, calibration, least_share)
        rows, scores = [], []
        for name, mixture in model.predictor.network.mixtures().items():
            left = pruned.network.kept_experts.get(name)
            number = mixture.router.num_experts
            rows.append((name, number, number if left is None else len(left)))
        if not rows:
            raise EvaluationError(f"{model.name} has no experts to prune; take one with several.")
        if not pruned.network.kept_experts:
            least = min(share.min() for share in model.predictor.expert_usage.weight_share.values())
            raise EvaluationError(
                f"no expert has a share of at most {least_share}, the smallest is {least:.3g}; "
                "give a larger --least-share."
            )
        show(frame_table(pd.DataFrame(rows, columns=["router", "experts", "kept"])))
        for predictor in (model.predictor, pruned):
            seed_all(seed)
            result = backtest(
                predictor,
                entries,
                prediction_length=horizon,
                windows=windows,
                seasonality=season_length(entries[0]["start"]),
                metrics=[CRPS],
                diagnose=False,
                dataset_name=source.name,
            )
            weights = sum(weight.numel() for weight in predictor.network.parameters())
            scores.append((next(iter(result.metrics.values())), weights))
        table = pd.DataFrame(scores, columns=["CRPS", "weights"])
        table.insert(0, "model", ["as it was", "pruned"])
        show(frame_table(table, digits=6))
        (before, _), (after, _) = scores
        over = f"{windows} window{'s' * (windows > 1)}"
        say(f"CRPS {after - before:+.6f} ({after / before - 1:+.2%}) over {over}")
        with folder_written_whole(out) as folder:
            pruned.serialize(folder)
            if model.record is not None:
                model.record.write(folder)
        say(f"wrote {out}")


def _before(entries: List[Entry], steps: int, future: int) -> List[Entry]:
    """Entries without the last `steps`; what is known ahead stays for `future` steps of them."""
    shortened = []
    for entry in entries:
        end = entry["target"].shape[-1] - steps
        if end < 1:
            raise EvaluationError(
                f"item {entry['item_id']!r} has {end + steps} values, of which --windows takes "
                f"{steps}; give fewer windows, or leave the item out."
            )
        short = {**entry, "target": entry["target"][..., :end]}
        for name, known in (("feat_dynamic_real", future), ("past_feat_dynamic_real", 0)):
            if name in entry:
                short[name] = entry[name][:, : end + known]
        shortened.append(short)
    return shortened
