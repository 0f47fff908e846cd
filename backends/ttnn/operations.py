"""What runs on the device, as functions of ttnn's tensors.

Every tensor consists of whole tiles, padded with numbers that change nothing, so that no kernel
has padding of its own to keep out. Shape suffixes as in :mod:`..problems`; E is padded to a power
of two of at least 64, which is what top-k sorts.
"""

from typing import Any, Dict, NamedTuple, Optional

import torch
import ttnn
from torch import Tensor
from torch.nn import functional as F

from ..problems import LinearMixture, Scoring
from .device import Device, whole_tiles

# Stands for minus infinity, which not all kernels bear.
_LOWEST = -1e30
_FEWEST_SORTED = 64
# What activations may take of the cores' own memory, 1.5 MB for each of some 130.
_L1_BYTES = 64 << 20


class Numbers(NamedTuple):
    """Types on the device.

    Attributes
    ----------
    activations
        What is uploaded, what lies between operations, what is downloaded.
    weights
        The experts' matrices.
    """

    activations: Any
    weights: Any

    @classmethod
    def of(cls, precision: str) -> "Numbers":
        if precision == "float32":
            return cls(ttnn.float32, ttnn.float32)
        return cls(ttnn.bfloat16, ttnn.bfloat8_b if precision == "bfloat8_b" else ttnn.bfloat16)


class Operations:
    """Operations on one device in one precision.

    Parameters
    ----------
    device
        The device.
    numbers
        Types to compute in.
    """

    def __init__(self, device: Device, numbers: Numbers) -> None:
        self.device = device
        self.numbers = numbers

    def upload_experts(self, expand_EIF: Tensor, contract_EFO: Tensor) -> Dict[str, Any]:
        """Gated experts as three matrices side by side, and what spreads weights over them."""
        num_experts, hidden = len(expand_EIF), contract_EFO.shape[1]
        wide, padded = padded_experts(num_experts), whole_tiles(hidden)
        gate, up = (
            self._side_by_side(_pad(half, whole_tiles(half.shape[1]), padded))
            for half in expand_EIF.detach().float().chunk(2, dim=-1)
        )
        contract = _pad(contract_EFO.detach().float(), padded, whole_tiles(contract_EFO.shape[-1]))
        return {
            "gate": self._weights(gate),
            "up": self._weights(up),
            "contract": self._weights(contract.flatten(0, 1)),
            "spread": self._spread(num_experts, wide, padded),
        }

    def upload_scoring(self, scoring: Scoring) -> Dict[str, Any]:
        """A router's matrix, with experts that are never chosen where there is padding."""
        rows = scoring.weight_EI.detach().float()
        num_experts, features = rows.shape
        wide = padded_experts(num_experts)
        absent = torch.full((1, wide), _LOWEST)
        absent[:, :num_experts] = 0.0
        weight = _pad(rows.T, whole_tiles(features), wide)
        if not scoring.by_distance:
            return {
                "router": self.device.upload(weight, self.numbers.activations),
                "bias": self.device.upload(absent, ttnn.float32),
            }
        squares = F.pad(rows.square().sum(dim=-1), (0, wide - num_experts)).unsqueeze(0)
        return {
            "router": self.device.upload(-2.0 * weight, self.numbers.activations),
            "bias": self.device.upload(squares, ttnn.float32),
            "absent": self.device.upload(absent, ttnn.float32),
        }

    def upload_mixture(self, mixture: LinearMixture) -> Dict[str, Any]:
        """A network of linear experts, each group's in one matrix."""
        direct = mixture.direct_GEFO
        num_experts, features, outputs = direct.shape[1:]
        rows, columns = whole_tiles(features), whole_tiles(outputs)
        stacked = [_pad(direct, rows, columns).flatten(1, 2)]
        prepared: Dict[str, Any] = {}
        spread = [rows]
        if mixture.hidden_GEFH is not None and mixture.contract_GEHO is not None:
            hidden = whole_tiles(mixture.hidden_GEFH.shape[-1])
            prepared["hidden"] = self._weights(
                self._side_by_side(_pad(mixture.hidden_GEFH, rows, hidden))
            )
            stacked.append(_pad(mixture.contract_GEHO, hidden, columns).flatten(1, 2))
            spread.append(hidden)
        prepared["experts"] = self._weights(torch.cat(stacked, dim=1))
        if mixture.router_hidden_GFR is None or mixture.router_output_GRE is None:
            return prepared
        wide = padded_experts(num_experts)
        units = whole_tiles(mixture.router_hidden_GFR.shape[-1])
        output = _pad(mixture.router_output_GRE, units, wide)
        # The last unit is always 1.
        output[:, mixture.router_hidden_GFR.shape[-1] - 1, num_experts:] = _LOWEST
        hidden_weights = _pad(mixture.router_hidden_GFR, rows, units)
        prepared["router_hidden"] = self._activations(hidden_weights)
        prepared["router_output"] = self._activations(output)
        prepared["spread"] = self._activations(
            torch.cat([_spread(num_experts, wide, size) for size in spread], dim=-1)[None, None]
        )
        return prepared

    def routed_ffn(
        self, x: Any, router: Dict[str, Any], experts: Dict[str, Any], scoring: Scoring, top_k: int
    ) -> Any:
        """``[T, outputs | scores | weights]``."""
        scores = self._scores(self._logits(x, router, scoring))
        weights = self._chosen(
            scores, len(scoring.weight_EI), top_k, normalised=not scoring.weighted_by_score
        )
        return self._join(self.gated_ffn(x, weights, experts), scores, weights)

    def gated_ffn(self, x: Any, weights: Any, experts: Dict[str, Any]) -> Any:
        """``[T, O]`` of all experts, those not chosen with weight 0."""
        memory = self._memory(x, experts["gate"])
        gate = self._linear(x, experts["gate"], memory, activation="silu")
        up = self._linear(x, experts["up"], memory)
        hidden = ttnn.multiply(gate, up, memory_config=memory)
        # Weighting what the last product reads leaves one sum over all experts and features.
        spread = self._linear(weights, experts["spread"], memory)
        weighted = ttnn.multiply(hidden, spread, memory_config=memory)
        return self._linear(weighted, experts["contract"], memory)

    def linear_mixture(self, x: Any, prepared: Dict[str, Any], num_experts: int, top_k: int) -> Any:
        """``[1, G, T, outputs | scores | weights]``, or the outputs alone of a single expert."""
        memory = self._memory(x, prepared["experts"], inner=True)
        parts = [x] * num_experts
        if "hidden" in prepared:
            parts.append(self._linear(x, prepared["hidden"], memory, activation="relu"))
        inputs = ttnn.concat(parts, dim=-1, memory_config=memory) if len(parts) > 1 else x
        if "router_hidden" not in prepared:
            return self._linear(inputs, prepared["experts"], memory)
        l1 = ttnn.L1_MEMORY_CONFIG
        hidden = self._linear(x, prepared["router_hidden"], l1, activation="relu")
        logits = self._linear(hidden, prepared["router_output"], l1, dtype=ttnn.float32)
        scores = self._scores(logits)
        weights = self._chosen(scores, num_experts, top_k, normalised=True)
        spread = self._linear(weights, prepared["spread"], memory)
        weighted = ttnn.multiply(inputs, spread, memory_config=memory)
        mixed = self._linear(weighted, prepared["experts"], memory)
        return self._join(mixed, scores, weights)

    def _logits(self, x: Any, router: Dict[str, Any], scoring: Scoring) -> Any:
        """``[T, E]`` in float32, lowest for experts that are padding."""
        l1 = ttnn.L1_MEMORY_CONFIG
        product = self._linear(x, router["router"], l1, bias=router["bias"], dtype=ttnn.float32)
        if not scoring.by_distance:
            return product
        # |x - c|² = |x|² + |c|² - 2 x·c, of which the product has the last two.
        squares = ttnn.multiply(x, x, dtype=ttnn.float32, memory_config=l1)
        length = ttnn.sum(
            squares, dim=-1, keepdim=True, compute_kernel_config=self.device.kernel_config
        )
        root = [
            ttnn.UnaryWithParam(ttnn.UnaryOpType.RELU),
            ttnn.UnaryWithParam(ttnn.UnaryOpType.SQRT),
        ]
        distances = ttnn.add(product, length, activations=root, memory_config=l1)
        return ttnn.add(distances, router["absent"], memory_config=l1)

    def _scores(self, logits: Any) -> Any:
        scores = ttnn.softmax(
            logits,
            dim=-1,
            numeric_stable=True,
            compute_kernel_config=self.device.kernel_config,
            memory_config=ttnn.L1_MEMORY_CONFIG,
        )
        return self._as_activations(scores)

    def _chosen(self, scores: Any, num_experts: int, top_k: int, normalised: bool) -> Any:
        """The largest ``top_k`` scores in their places, 0 elsewhere."""
        if top_k == num_experts:
            return scores
        places = ttnn.topk(scores, top_k, dim=-1)[1]
        shape = tuple(scores.shape)
        zeros = self.device.constant(0.0, shape)
        ones = self.device.constant(1.0, (*shape[:-1], top_k))
        # Ones instead of the scores, because float32 cannot be scattered.
        mask = ttnn.to_layout(ttnn.scatter(zeros, -1, places, ones), ttnn.TILE_LAYOUT)
        chosen = ttnn.multiply(
            scores, self._as_activations(mask), memory_config=ttnn.L1_MEMORY_CONFIG
        )
        if not normalised:
            return chosen
        total = ttnn.sum(
            chosen, dim=-1, keepdim=True, compute_kernel_config=self.device.kernel_config
        )
        return ttnn.multiply(chosen, ttnn.reciprocal(total), memory_config=ttnn.L1_MEMORY_CONFIG)

    def _join(self, outputs: Any, scores: Any, weights: Any) -> Any:
        """One tensor, so that one download brings all."""
        return ttnn.concat([outputs, scores, weights], dim=-1)

    def _linear(
        self,
        x: Any,
        weight: Any,
        memory: Any,
        bias: Optional[Any] = None,
        activation: Optional[str] = None,
        dtype: Optional[Any] = None,
    ) -> Any:
        return ttnn.linear(
            x,
            weight,
            bias=bias,
            activation=activation,
            dtype=dtype or self.numbers.activations,
            memory_config=memory,
            compute_kernel_config=self.device.kernel_config,
        )

    def _memory(self, x: Any, weight: Any, inner: bool = False) -> Any:
        """The cores' own memory for what lies between products, if it is large enough."""
        rows = 1
        for size in tuple(x.shape)[:-1]:
            rows *= size
        columns = weight.shape[-2 if inner else -1]
        fits = 3 * rows * columns * (4 if x.dtype == ttnn.float32 else 2) <= _L1_BYTES
        return ttnn.L1_MEMORY_CONFIG if fits else ttnn.DRAM_MEMORY_CONFIG

    def _as_activations(self, x: Any) -> Any:
        if x.dtype == self.numbers.activations:
            return x
        return ttnn.typecast(x, self.numbers.activations, memory_config=ttnn.L1_MEMORY_CONFIG)

    def _weights(self, matrix: Tensor) -> Any:
        return self.device.upload(_four(matrix), self.numbers.weights)

    def _activations(self, matrix: Tensor) -> Any:
        return self.device.upload(_four(matrix), self.numbers.activations)

    def _spread(self, num_experts: int, wide: int, size: int) -> Any:
        return self._activations(_spread(num_experts, wide, size))

    @staticmethod
    def _side_by_side(weight_EIO: Tensor) -> Tensor:
        """``[…, I, E O]``."""
        return weight_EIO.transpose(-3, -2).flatten(-2)


def padded_experts(num_experts: int) -> int:
    return max(_FEWEST_SORTED, 1 << (num_experts - 1).bit_length())


def _four(matrix: Tensor) -> Tensor:
    """With a dimension of 1 before the groups."""
    return matrix.unsqueeze(0) if matrix.dim() == 3 else matrix


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right."""
    missing = (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2])
    return F.pad(matrix.detach().float(), missing)


def _spread(num_experts: int, wide: int, size: int) -> Tensor:
    """Repeats each expert's weight for the columns that are its own, by a product."""
    return F.pad(torch.eye(num_experts), (0, 0, 0, wide - num_experts)).repeat_interleave(
        size, dim=1
    )
