"""`moecast benchmark MODEL_DIR`: how fast a saved model forecasts, and in how much memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, List, Optional

import numpy as np
import pandas as pd
import torch
import typer
from torch.distributions import constraints

from ...backends import BACKEND_NAMES
from ...distributions import support_of
from ...forecasters import MoEPredictor
from ...forecasters.fields import WindowConfig
from ...forecasters.frequencies import to_period
from ..datasets import Entry
from ..environment import describe_environment, peak_memory_bytes
from ..errors import EvaluationError
from ..tables import suggestion
from .console import check_table_path, command, frame_table, say, sentences_from, show, write_table
from .model_folder import Device, ModelDir, SavedModel, load_model
from .progress import progress_bar

_QUANTILES = (0.1, 0.5, 0.9)
_PROFILED_ROWS = 20
_START = "2024-01-01"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "benchmark")
    def benchmark_command(
        model_dir: ModelDir,
        batch_size: Annotated[
            List[int],
            typer.Option("--batch-size", min=1, help="Series per batch; may be repeated."),
        ] = [1, 32],  # noqa: B006  typer copies it
        backend: Annotated[
            Optional[List[str]],
            typer.Option("--backend", help="Backend; may be repeated. By default the model's."),
        ] = None,
        repeats: Annotated[
            int, typer.Option("--repeats", min=2, help="Batches timed, after the first two.")
        ] = 30,
        num_samples: Annotated[
            Optional[int],
            typer.Option("--num-samples", min=1, help="Paths, of forecasts made of paths."),
        ] = None,
        device: Device = None,
        profile: Annotated[
            bool,
            typer.Option(
                "--profile",
                help="Print torch's profile of one batch or, of ttnn, its device programs and "
                "copies to and from the device.",
            ),
        ] = False,
        out: Annotated[
            Optional[Path],
            typer.Option("--out", help="File for the table: .csv, .json, .jsonl or .parquet."),
        ] = None,
    ) -> None:
        """Throughput, latency and memory of forecasting batches of random series.

        The time of a batch is from GluonTS entries to its forecasts' means and three quantiles.
        Columns are those of Tenstorrent's performance reports (models/perf in tt-metal): the first
        run compiles and fills caches, inference time is the median of the timed batches.
        """
        if out is not None:
            check_table_path(out)
        for name in backend or []:
            if name not in BACKEND_NAMES:
                raise EvaluationError(f"--backend {name!r}: {suggestion(name, BACKEND_NAMES)}.")
        model = load_model(model_dir, device)
        rows = []
        for name in backend or [getattr(model.predictor.network.config, "backend", "auto")]:
            for size in batch_size:
                predictor = _with_backend(model.predictor, name, size, device)
                entries = random_entries(
                    model.window, support_of(predictor.network.distr_output), size
                )
                rows.append(_measure(model, predictor, name, entries, repeats, num_samples))
                if profile:
                    show(_profile(predictor, entries, num_samples))
        frame = pd.DataFrame(rows)
        show(frame_table(frame))
        say(", ".join(f"{name} {value}" for name, value in describe_environment().items()))
        if out is not None:
            write_table(frame, out)
            say(f"wrote {out}")


def random_entries(window: WindowConfig, support: Any, count: int) -> List[Entry]:
    """Series of a model's fields, one context long, with random values that its head may have."""
    generator = np.random.default_rng(0)
    start = to_period(pd.Period(_START, freq=window.freq or "h"), window.freq)
    length, ahead = window.context_length, window.future_length
    shape = (count, window.target_dim, length)
    within_1 = isinstance(support, constraints.interval)
    values = generator.uniform(0.1, 0.9, shape) if within_1 else 1 + generator.poisson(20, shape)
    entries = []
    for number in range(count):
        target = values[number].astype(np.float32)
        entry: Entry = {
            "item_id": str(number),
            "start": start,
            "target": target if window.target_dim > 1 else target[0],
        }
        for name, width, steps in (
            ("feat_dynamic_real", window.num_feat_dynamic_real, length + ahead),
            ("past_feat_dynamic_real", window.num_past_feat_dynamic_real, length),
        ):
            if width:
                entry[name] = generator.normal(size=(width, steps)).astype(np.float32)
        if window.num_feat_static_real:
            entry["feat_static_real"] = np.zeros(window.num_feat_static_real, dtype=np.float32)
        if window.cardinality:
            entry["feat_static_cat"] = np.zeros(len(window.cardinality), dtype=np.int32)
        entries.append(entry)
    return entries


def _with_backend(
    predictor: MoEPredictor, backend: str, batch_size: int, device: Optional[str]
) -> MoEPredictor:
    """A predictor of the same network whose experts another backend computes."""
    other = type(predictor)(
        predictor.network,
        batch_size=batch_size,
        device=device or "auto",
        calibration=predictor.calibration,
        num_samples=predictor.num_samples,
    )
    with sentences_from(ValueError, RuntimeError, before=f"--backend {backend}: "):
        return other.to_backend(backend)


def _forecast(predictor: MoEPredictor, entries: List[Entry], num_samples: Optional[int]) -> None:
    for forecast in predictor.predict(entries, num_samples=num_samples):
        _ = forecast.mean
        for level in _QUANTILES:
            forecast.quantile(level)


def _measure(
    model: SavedModel,
    predictor: MoEPredictor,
    backend: str,
    entries: List[Entry],
    repeats: int,
    num_samples: Optional[int],
) -> dict[str, Any]:
    device = torch.device(predictor.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    with progress_bar("batches") as progress:
        description = f"{backend}, {len(entries)} series"
        for _ in progress.track(range(repeats + 2), description=description):
            started = time.perf_counter()
            _forecast(predictor, entries, num_samples)
            seconds.append(time.perf_counter() - started)
    first, second, *timed = seconds
    median = float(np.median(timed))
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory_bytes()
    window = model.window
    return {
        "Model": model.name,
        "Setting": f"{backend} {device}, {window.context_length} to {window.prediction_length}",
        "Batch": len(entries),
        "First Run (sec)": first,
        "Second Run (sec)": second,
        "Compile Time (sec)": max(first - second, 0.0),
        "Inference Time (sec)": median,
        "Throughput (batch*inf/sec)": len(entries) / median,
        "Latency Median (ms)": 1e3 * median,
        "Latency 95% (ms)": 1e3 * float(np.quantile(timed, 0.95)),
        "Peak Memory (MB)": None if memory is None else memory / 1e6,
    }


def _profile(predictor: MoEPredictor, entries: List[Entry], num_samples: Optional[int]) -> str:
    if predictor.network.backend.name == "ttnn":
        from ...backends.ttnn.counting import counted

        with counted() as counts:
            _forecast(predictor, entries, num_samples)
        return (
            f"of a batch on the device: {counts.programs} programs, {counts.uploads} uploads, "
            f"{counts.downloads} downloads"
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.device(predictor.device).type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        _forecast(predictor, entries, num_samples)
    sort_by = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=sort_by, row_limit=_PROFILED_ROWS)
