"""Batches of windows for training and validation.

A dataset that does not fit in memory is worked through in chunks.
"""

import logging
from itertools import repeat
from typing import Any, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from gluonts.transform.sampler import InstanceSampler
from torch.distributions import constraints

from .fields import WindowConfig
from .series import Anchors, Batch, SeriesArrays, held_out_steps, read_chunks

logger = logging.getLogger(__name__)

_BATCHES_AT_ONCE = 64


class TrainingWindows:
    """Batches of random training windows, the same for the same seed and epoch.

    Parameters
    ----------
    dataset
        The series. It is read once if it fits into ``max_bytes``, and otherwise streamed again
        and again, a chunk of ``max_bytes`` at a time.
    config, input_names
        What a window holds, and which fields the network reads.
    batch_size, num_batches
        Windows per batch and batches per epoch.
    seed
        Decides which windows are drawn; with the epoch, so that a resumed training goes on with
        the windows it would have seen.
    sampler
        A GluonTS sampler that picks the windows of a series. By default all series are equally
        likely, long or short, and all windows of a series that have a full context.
    max_bytes
        Memory for the series; ``None`` for no limit.
    calibration_windows
        Windows at the end of each series that are kept from training.
    support
        The values that targets may have.
    shortest_context
        Steps of context that are enough in series too short for a full one, see
        :meth:`SeriesArrays.trainable_anchors`.

    Raises
    ------
    ValueError
        If the dataset is empty, malformed, or has no series long enough for one window.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        config: WindowConfig,
        input_names: Sequence[str],
        batch_size: int,
        num_batches: int,
        seed: int,
        sampler: Optional[InstanceSampler] = None,
        max_bytes: Optional[int] = None,
        calibration_windows: int = 0,
        support: constraints.Constraint = constraints.real,
        shortest_context: Optional[int] = None,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._input_names = (*input_names, "future_target")
        self._batch_size = batch_size
        self._num_batches = num_batches
        self.seed = seed
        self._sampler = sampler
        self._max_bytes = max_bytes
        self.calibration_windows = calibration_windows
        self.epoch = 0

        self._support = support
        self._shortest_context = shortest_context
        chunks = self._read_chunks()
        first = next(chunks, None)
        if first is None:
            raise ValueError("the training dataset is empty")
        self.first_chunk = first
        self._streams = next(chunks, None) is not None
        if self._streams:
            logger.info("The dataset exceeds %s bytes and is streamed", max_bytes)
        self._stream: Optional[Iterator[SeriesArrays]] = None
        self._streamed = 0
        self._last_anchors: Optional[Tuple[SeriesArrays, Anchors]] = None
        if not self._streams:
            if len(self._anchors(first)[0]) == 0:
                raise ValueError(self._no_window(first.lengths))
            too_short = int((first.lengths <= config.future_length).sum())
            if too_short:
                logger.warning(
                    "%d of %d series are shorter than %d steps and not trained on",
                    too_short,
                    len(first),
                    config.future_length + 1,
                )

    def __len__(self) -> int:
        return self._num_batches

    @property
    def sampler(self) -> "TrainingWindows":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = np.random.default_rng([self.seed, self.epoch, rank])
        chunk: Optional[SeriesArrays] = None
        drawn: Iterator[Anchors] = iter(())
        for current in self._chunks_of_epoch():
            if current is not chunk:
                chunk, drawn = current, self._draw(current, generator)
            yield current.cut(next(drawn), self._input_names)

    def _chunks_of_epoch(self) -> Iterator[SeriesArrays]:
        """The chunk that each batch of the epoch is cut from."""
        if not self._streams:
            if self._sampler is not None and not self._picks_any(self.first_chunk):
                raise ValueError(f"train_sampler={self._sampler!r} picks no window")
            yield from repeat(self.first_chunk, self._num_batches)
            return
        begin = self.epoch * self._num_batches
        if self._stream is None or self._streamed != begin:
            # After resuming, the stream goes on where it would have been.
            self._stream, self._streamed = self._endless_chunks(), 0
        for chunk in self._stream:
            self._streamed += 1
            if self._streamed > begin:
                yield chunk
            if self._streamed == begin + self._num_batches:
                return

    def _read_chunks(self) -> Iterator[SeriesArrays]:
        return read_chunks(self._dataset, self._config, self._max_bytes, self._support)

    def _endless_chunks(self) -> Iterator[SeriesArrays]:
        """Chunks in turn, each for about as many batches as pass over it once."""
        while True:
            usable = False
            for chunk in self._read_chunks():
                if len(self._anchors(chunk)[0]) == 0 or not self._picks_any(chunk):
                    continue
                usable = True
                one_pass = max(len(chunk), int(chunk.lengths.sum()) // self._config.context_length)
                yield from repeat(chunk, max(one_pass // self._batch_size, 1))
            if not usable:
                self._refuse_stream()

    def _refuse_stream(self) -> None:
        chunks = list(self._read_chunks())
        if not chunks:
            raise ValueError(
                f"the dataset exceeds max_dataset_bytes={self._max_bytes} and can be read only "
                "once: give one that can be iterated again, or cache_data=True"
            )
        for chunk in chunks:
            if len(self._anchors(chunk)[0]):
                raise ValueError(f"train_sampler={self._sampler!r} picks no window")
        lengths = np.concatenate([chunk.lengths for chunk in chunks])
        raise ValueError(self._no_window(lengths))

    def _picks_any(self, chunk: SeriesArrays) -> bool:
        """Whether the sampler picks a window of the chunk, asked a hundred times."""
        if self._sampler is None:
            return True
        state = np.random.RandomState(self.seed).get_state()
        for _ in range(100):
            for i in range(len(chunk)):
                steps, state = self._sample(chunk, i, state)
                if steps:
                    return True
        return False

    def _sample(self, chunk: SeriesArrays, series: int, state: Any) -> Tuple[List[int], Any]:
        """Ask the sampler, with NumPy's global generator in a state of this object's own."""
        assert self._sampler is not None
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(state)  # noqa: NPY002
        try:
            steps = sample(chunk, series, self._sampler, self.calibration_windows)
            return steps, np.random.get_state()  # noqa: NPY002
        finally:
            np.random.set_state(outside)  # noqa: NPY002

    def _draw(self, chunk: SeriesArrays, generator: np.random.Generator) -> Iterator[Anchors]:
        """An endless run of batches of anchors."""
        if self._sampler is None:
            yield from self._draw_evenly(self._anchors(chunk), generator)
        seed = int(generator.integers(2**32))
        state = np.random.RandomState(seed).get_state()
        pending: List[Tuple[int, int]] = []
        while True:
            for i in generator.permutation(len(chunk)).tolist():
                steps, state = self._sample(chunk, i, state)
                pending.extend((i, step) for step in steps)
                while len(pending) >= self._batch_size:
                    batch = np.array(pending[: self._batch_size])
                    pending = pending[self._batch_size :]
                    yield batch[:, 0], batch[:, 1]

    def _draw_evenly(self, anchors: Anchors, generator: np.random.Generator) -> Iterator[Anchors]:
        """Every series alike, and every window of a series."""
        series, steps = anchors
        first = np.flatnonzero(np.diff(series, prepend=-1))
        counts = np.diff(first, append=len(series))
        while True:
            drawn = generator.integers(len(first), size=(_BATCHES_AT_ONCE, self._batch_size))
            picked = first[drawn] + generator.integers(counts[drawn])
            yield from zip(series[picked], steps[picked])

    def _anchors(self, chunk: SeriesArrays) -> Anchors:
        if self._last_anchors is None or self._last_anchors[0] is not chunk:
            anchors = chunk.trainable_anchors(self.calibration_windows, self._shortest_context)
            self._last_anchors = chunk, anchors
        return self._last_anchors[1]

    def _no_window(self, lengths: np.ndarray) -> str:
        needed = self._config.future_length + 1
        too_short = int((lengths < needed).sum())
        others = ", and the others have no observed values there"
        return (
            f"no window to train on: of {len(lengths)} series, {too_short} are shorter than the "
            f"{needed} steps that one step of context, lead_time={self._config.lead_time} and "
            f"prediction_length={self._config.prediction_length} need"
            f"{others if too_short < len(lengths) else ''}"
        )


def sample(
    chunk: SeriesArrays, series: int, sampler: InstanceSampler, calibration_windows: int = 0
) -> List[int]:
    """The steps at which a GluonTS sampler starts forecasts of one series.

    GluonTS's samplers reckon with ``min_future``; a step too late for lead time and horizon, or
    without a step of context, is left out.
    """
    length = chunk.lengths[series]
    length = length - held_out_steps(length, chunk.config, calibration_windows)
    steps = sampler(chunk.target_of(series)[..., :length])
    return [int(step) for step in steps if 1 <= step <= length - chunk.config.future_length]


class ValidationWindows:
    """The same windows every time, by default the last of each series.

    Parameters
    ----------
    dataset, config, input_names, batch_size
        As for :class:`TrainingWindows`.
    sampler
        A GluonTS sampler; by default the last window of each series that has one.
    support
        The values that targets may have.

    Raises
    ------
    ValueError
        If there is no window.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        config: WindowConfig,
        input_names: Sequence[str],
        batch_size: int,
        sampler: Optional[InstanceSampler] = None,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        chunk = next(read_chunks(dataset, config, support=support), None)
        if chunk is None:
            raise ValueError("the validation dataset is empty")
        if sampler is None:
            series, steps = chunk.last_anchors(held_out=config.future_length)
            usable = steps >= 1
            anchors = series[usable], steps[usable]
        else:
            pairs = [(i, step) for i in range(len(chunk)) for step in sample(chunk, i, sampler)]
            table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
            anchors = table[:, 0], table[:, 1]
        # A horizon without a value would count as a loss of 0.
        self._anchors = chunk.with_observations(anchors)
        if len(self._anchors[0]) == 0:
            raise ValueError(
                f"no window to validate on: each of the {len(chunk)} series is shorter than "
                f"{config.future_length + 1} steps or has no observed value in context or horizon"
            )
        self._chunk = chunk
        self._input_names = (*input_names, "future_target")
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._anchors[0]) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        series, steps = self._anchors
        for begin in range(0, len(series), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            yield self._chunk.cut((series[part], steps[part]), self._input_names)
