"""What every predictor shares: batches, patch sizes, forecasts, saving and loading."""

import logging
from pathlib import Path
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
)

import numpy as np
import safetensors.torch
import torch
from gluonts.core.component import validated
from gluonts.dataset.common import DataEntry, Dataset
from gluonts.dataset.field_names import FieldName
from gluonts.itertools import batcher
from gluonts.model.forecast import Forecast, SampleForecast
from gluonts.model.forecast_generator import DistributionForecastGenerator
from gluonts.torch.model.predictor import PyTorchPredictor
from gluonts.transform import Identity
from torch import Tensor, nn

from ..backends import BackendUnavailableError, get_backend
from .calibration import Calibration
from .forecast import BatchDistribution, BatchedDistributionForecast
from .moe import ExpertUsage, Routing, window_shares
from .network import ForecastNetwork, NetworkOutput
from .patching import best_patch_sizes
from .serialization import ModelFolder
from .series import Batch, SeriesArrays, history_ends

logger = logging.getLogger(__name__)

P = TypeVar("P", bound="MoEPredictor")


class MoEPredictor(PyTorchPredictor):
    """Forecasts with a trained network, a batch of series at a time.

    Routers and experts are computed by the backend that the network's settings name. Where that
    is one that this machine lacks, as a predictor saved elsewhere may say, it is torch, and a
    warning says so.

    Parameters
    ----------
    network
        The trained network.
    batch_size
        Series per batch.
    device
        ``"auto"`` for CUDA where there is one, or any torch device.
    calibration
        Corrects quantile levels; see :class:`moecast.forecasters.calibration.Calibration`.
    num_samples
        Samples of each forecast that is made of samples, unless :meth:`predict` is told a number.
    kept_experts
        Experts that were not pruned, by router; see :func:`prune_experts`.

    Attributes
    ----------
    expert_usage
        How much each expert was used by the last :meth:`predict`.
    reports_routing
        Whether the ``info`` of each forecast tells, as ``"expert_weights"``, the mean share of
        each expert in that window's mixtures: an array ``[E]`` of each router, by its name.
        False unless set; it is not saved.
    """

    @validated()
    def __init__(
        self,
        network: nn.Module,
        batch_size: int = 32,
        device: str = "auto",
        calibration: Any = None,
        num_samples: int = 100,
        kept_experts: Optional[Dict[str, List[int]]] = None,
    ) -> None:
        assert isinstance(network, ForecastNetwork)
        if kept_experts and network.kept_experts != kept_experts:
            network.keep_experts(kept_experts)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self.num_samples = num_samples
        super().__init__(
            input_names=list(network.input_names),
            prediction_net=network,
            batch_size=batch_size,
            prediction_length=network.window.prediction_length,
            input_transform=Identity(),
            forecast_generator=network.distr_output.forecast_generator,
            lead_time=network.window.lead_time,
            device=device,
        )
        self.calibration = calibration
        self.expert_usage = ExpertUsage()
        self.reports_routing = False
        self._window_shares: List[Dict[str, Tensor]] = []
        try:
            self.to_backend(network.config.backend)
        except BackendUnavailableError as error:
            logger.warning("%s; routers and experts are computed by torch", error)

    def to_backend(self: P, backend: str, precision: Optional[str] = None) -> P:
        """Compute routers and experts elsewhere from now on; what is saved does not change.

        Parameters
        ----------
        backend, precision
            As for :func:`moecast.backends.get_backend`. With ``"ttnn"`` all else is computed on
            the CPU.

        Returns
        -------
        MoEPredictor
            This one.

        Raises
        ------
        ValueError
            If there is no such backend or precision.
        BackendUnavailableError
            If it cannot be had on this machine.
        """
        found = get_backend(backend, precision)
        if found.name == "ttnn":
            self.to("cpu")
        self.network.use_backend(found)
        return self

    @property
    def calibration(self) -> Optional[Calibration]:
        """What corrects the quantile levels; it is saved and compared with the predictor."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Optional[Calibration]) -> None:
        self._calibration = calibration
        self.__init_args__["calibration"] = calibration

    def predict(self, dataset: Dataset, num_samples: Optional[int] = None) -> Iterator[Forecast]:
        """Forecast every series of a dataset.

        Parameters
        ----------
        dataset
            Entries with the fields that the model was trained with; ``feat_dynamic_real`` must
            reach over lead time and horizon.
        num_samples
            Number of samples, for forecasts that are made of samples.

        Yields
        ------
        Forecast
            One for each entry, in order.

        Raises
        ------
        ValueError
            If an entry lacks a field, a field has the wrong shape, or ``num_samples`` is less
            than 1.
        """
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self.expert_usage = ExpertUsage()
        self.network.eval()
        position = 0
        for entries in batcher(dataset, self.batch_size):
            yield from self._predict_batch(entries, position, num_samples)
            position += len(entries)

    def _predict_batch(
        self, entries: List[DataEntry], position: int, num_samples: Optional[int]
    ) -> List[Forecast]:
        network, window = self.network, self.network.window
        several = len(network.patch_sizes) > 1
        self._window_shares.clear()
        series = history_ends(
            entries,
            position,
            network.input_window,
            held_out=window.future_length if several else 0,
        )
        with torch.inference_mode():
            inputs = self._inputs(series, held_out=0)
            first = network.patch_sizes[0]
            chosen = self._choose_patch_sizes(series) if several else [first] * len(entries)
            samples: Optional[np.ndarray] = None
            if any(network.draws_paths(patch_size) for patch_size in network.patch_sizes):
                samples = self._paths(inputs, chosen, num_samples or self.num_samples)
            elif network.parameter_head.projection is not None:
                samples = self._sample(inputs, chosen, num_samples or self.num_samples)
            else:
                output = self._forward_by_patch_size(inputs, chosen)
        described = [
            {
                "start_date": entry_start + length + window.lead_time,
                "item_id": entry.get(FieldName.ITEM_ID),
                "info": entry.get(FieldName.INFO),
            }
            for entry, entry_start, length in zip(entries, series.starts, series.lengths.tolist())
        ]
        if several:
            for description, patch_size in zip(described, chosen):
                description["info"] = _add_to_info(description["info"], patch_size=patch_size)
        if self._window_shares:
            for description, weights in zip(described, self._expert_weights(inputs, chosen)):
                description["info"] = _add_to_info(description["info"], expert_weights=weights)
        if samples is not None:
            for description in described:
                description["info"] = _as_mapping(description["info"])
            return [SampleForecast(samples[:, i], **d) for i, d in enumerate(described)]
        return self._forecasts(output, described, num_samples)

    def _sample(self, inputs: Batch, chosen: List[int], num_samples: int) -> np.ndarray:
        """Samples ``[sample, batch, horizon(, channel)]`` of a head that draws as it computes."""
        head, squeeze = self.network.distr_output, self.network.window.target_dim == 1
        samples = []
        for _ in range(num_samples):
            output = _on_cpu(self._forward_by_patch_size(inputs, chosen), squeeze)
            distribution = head.distribution(output.distr_args, output.loc, output.scale)
            samples.append(distribution.sample())
        return torch.stack(samples).numpy()

    def _inputs(self, series: SeriesArrays, held_out: int, names: Iterable[str] = ()) -> Batch:
        batch = series.cut(series.last_anchors(held_out), (*self.input_names, *names))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _choose_patch_sizes(self, series: SeriesArrays) -> List[int]:
        """For each series, the patch size that best forecasts the end of its history."""
        network, window = self.network, self.network.window
        usable = series.lengths > window.future_length
        held_out = self._inputs(series, window.future_length, ["future_target"])
        target, observed = held_out["future_target"], held_out["future_observed_values"]
        scored = torch.from_numpy(usable).to(target.device) & observed.any(dim=1).any(dim=-1)
        losses = []
        for patch_size in network.patch_sizes:
            loss, _ = network.window_losses(held_out, patch_size)
            losses.append(torch.where(scored, loss, torch.full_like(loss, torch.inf)))
        return best_patch_sizes(losses, network.patch_sizes)

    def _by_patch_size(
        self, inputs: Batch, chosen: List[int]
    ) -> Tuple[List[Tuple[int, Batch]], Tensor]:
        """The rows that chose each patch size, and the order that puts them back."""
        rows_of: Dict[int, List[int]] = {}
        for row, patch_size in enumerate(chosen):
            rows_of.setdefault(patch_size, []).append(row)
        if len(rows_of) == 1:
            return [(chosen[0], inputs)], torch.arange(len(chosen), device=self.device)
        parts = [
            (patch_size, {name: tensor[rows] for name, tensor in inputs.items()})
            for patch_size, rows in rows_of.items()
        ]
        order = torch.tensor([row for rows in rows_of.values() for row in rows]).argsort()
        return parts, order.to(self.device)

    def _forward_by_patch_size(self, inputs: Batch, chosen: List[int]) -> NetworkOutput:
        """One pass for each patch size that was chosen, over the series that chose it."""
        parts, order = self._by_patch_size(inputs, chosen)
        outputs = []
        for patch_size, part in parts:
            outputs.append(self.network.outputs(part, patch_size))
            self._note(outputs[-1].routings)
        return outputs[0] if len(outputs) == 1 else _join(outputs, order)

    def _paths(self, inputs: Batch, chosen: List[int], num_samples: int) -> np.ndarray:
        """Paths ``[sample, batch, horizon(, channel)]`` that the network draws patch by patch."""
        parts, order = self._by_patch_size(inputs, chosen)
        drawn = []
        for patch_size, part in parts:
            paths, routings = self.network.sample_paths(part, patch_size, num_samples)
            self._note(routings)
            drawn.append(paths)
        samples = torch.cat(drawn, dim=1)[:, order]
        return (
            (samples.squeeze(-1) if self.network.window.target_dim == 1 else samples).cpu().numpy()
        )

    def _note(self, routings: Mapping[str, Routing]) -> None:
        self.expert_usage.update(routings)
        if self.reports_routing:
            self._window_shares.append(window_shares(routings))

    def _expert_weights(self, inputs: Batch, chosen: List[int]) -> List[Dict[str, np.ndarray]]:
        """For each series, the mean share of each expert, by router."""
        parts, order = self._by_patch_size(inputs, chosen)
        # A head that draws as it computes goes through the network once for each sample.
        shares = self._window_shares[: len(parts)]
        joined = {
            name: torch.cat([part[name] for part in shares])[order].cpu().numpy()
            for name in shares[0]
        }
        return [{name: rows[i] for name, rows in joined.items()} for i in range(len(chosen))]

    def _forecasts(
        self,
        output: NetworkOutput,
        described: List[Dict[str, Any]],
        num_samples: Optional[int],
    ) -> List[Forecast]:
        output = _on_cpu(output, squeeze=self.network.window.target_dim == 1)
        generator = self.forecast_generator
        if isinstance(generator, DistributionForecastGenerator):
            batch = BatchDistribution(
                self.network.distr_output,
                output.distr_args,
                output.loc,
                output.scale,
                self.calibration,
            )
            return [
                BatchedDistributionForecast(batch, i, **description)
                for i, description in enumerate(described)
            ]
        columns = {
            FieldName.FORECAST_START: [d["start_date"] for d in described],
            FieldName.ITEM_ID: [d["item_id"] for d in described],
            FieldName.INFO: [d["info"] for d in described],
        }
        arguments = self.network.distr_output, output.distr_args
        result = (_in_order(*arguments), output.loc, output.scale)
        return list(
            generator(
                inference_data_loader=[columns],
                prediction_net=lambda: result,
                input_names=[],
                output_transform=None,
                num_samples=num_samples,
            )
        )

    def serialize(self, path: Path) -> None:
        """Write the predictor into an existing folder: two JSON files and the weights."""
        super(PyTorchPredictor, self).serialize(Path(path))
        weights = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        safetensors.torch.save_file(weights, str(ModelFolder(path).weights))

    @classmethod
    def deserialize(
        cls: Type[P], path: Path, device: Optional[Union[str, torch.device]] = None
    ) -> P:
        """Read a predictor written by :meth:`serialize`, on any machine.

        Nothing in the folder is unpickled, and no module is imported because the folder names it.

        Parameters
        ----------
        path
            The folder.
        device
            Where to run; ``"auto"`` by default, also for a model that was trained elsewhere.

        Raises
        ------
        ValueError
            If the folder holds no such predictor, or is damaged.
        """
        folder = ModelFolder(path)
        predictor = folder.read_predictor(cls)
        folder.load_weights(predictor.network)
        predictor.network.eval()
        if device is not None or predictor.network.backend.name != "ttnn":
            predictor.to(device or "auto")
        return predictor


def _on_cpu(output: NetworkOutput, squeeze: bool) -> NetworkOutput:
    """The output as GluonTS has it, without channel for univariate series."""

    def convert(tensor: Tensor) -> Tensor:
        return (tensor.squeeze(2) if squeeze else tensor).cpu()

    return NetworkOutput(
        tuple(convert(argument) for argument in output.distr_args),
        convert(output.loc),
        convert(output.scale),
        output.routings,
    )


def _in_order(distr_output: Any, distr_args: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
    """Quantiles sorted, so that none crosses another; other arguments as they are."""
    if hasattr(distr_output, "quantiles"):
        return tuple(argument.sort(dim=-1).values for argument in distr_args)
    return distr_args


def _join(outputs: List[NetworkOutput], order: Tensor) -> NetworkOutput:
    def join(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts))[order]

    return NetworkOutput(
        tuple(join(parts) for parts in zip(*(output.distr_args for output in outputs))),
        join(output.loc for output in outputs),
        join(output.scale for output in outputs),
        {},
    )


def _as_mapping(info: Any) -> Optional[Mapping[str, Any]]:
    return info if info is None or isinstance(info, Mapping) else {"info": info}


def _add_to_info(info: Any, **added: Any) -> Dict[str, Any]:
    return {**(_as_mapping(info) or {}), **added}
