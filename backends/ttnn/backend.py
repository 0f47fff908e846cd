"""The backend's functions: from torch's tensors to the device and back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Dict, Hashable

import torch
from torch import Tensor

from ..problems import LinearMixture, Mixed, Scoring
from ..torch import TorchBackend
from .device import the_device, whole_tiles

if TYPE_CHECKING:
    from .operations import Operations

PRECISIONS = ("bfloat16", "float32", "bfloat8_b")


@dataclass(frozen=True)
class TtnnBackend(TorchBackend):
    """Forecasts on a Tenstorrent device; what has gradients is torch's.

    Each function uploads one tensor and downloads one, or a few where there are many tokens.
    Tokens are padded to a power of two, so that few shapes are compiled.

    Parameters
    ----------
    precision
        ``"bfloat16"``, ``"float32"``, or ``"bfloat8_b"`` for the experts' weights and bfloat16 for
        the rest. Sums are in float32.

    Raises
    ------
    ValueError
        If there is no such precision.
    """

    precision: str = "bfloat16"

    name = "ttnn"
    folds = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown: choose one of {', '.join(PRECISIONS)}"
            )

    def gated_ffn(
        self,
        x_TI: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Tensor:
        if torch.is_grad_enabled() or len(x_TI) == 0:
            return super().gated_ffn(x_TI, weights_TK, ids_TK, expand_EIF, contract_EFO)
        from .operations import padded_experts, ttnn

        operations = self._operations()
        experts = self._prepare_experts(operations, expand_EIF, contract_EFO)
        features = whole_tiles(x_TI.shape[-1])
        wide = padded_experts(len(expand_EIF))
        dense = torch.zeros(len(x_TI), wide, device=x_TI.device)
        dense.scatter_(-1, ids_TK, weights_TK.float())
        # Tokens and weights side by side are one upload.
        given = torch.cat([_columns(x_TI, features), dense], dim=-1)

        def program(both: ttnn.Tensor) -> ttnn.Tensor:
            rows = both.shape[-2]
            x = ttnn.slice(both, [0, 0], [rows, features])
            weights = ttnn.slice(both, [0, features], [rows, features + wide])
            return operations.gated_ffn(x, weights, experts)

        result = self._run(program, ("gated", id(experts)), given)
        return result[:, : contract_EFO.shape[-1]].to(x_TI)

    def routed_ffn(
        self,
        x_TI: Tensor,
        scoring: Scoring,
        top_k: int,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Mixed:
        if torch.is_grad_enabled() or len(x_TI) == 0:
            return super().routed_ffn(x_TI, scoring, top_k, expand_EIF, contract_EFO)
        operations = self._operations()
        experts = self._prepare_experts(operations, expand_EIF, contract_EFO)
        router = operations.device.prepare(
            [scoring.weight_EI],
            (self.precision, scoring.by_distance),
            lambda: operations.upload_scoring(scoring),
        )
        result = self._run(
            lambda x: operations.routed_ffn(x, router, experts, scoring, top_k),
            ("routed", id(router), id(experts), top_k),
            _columns(x_TI, whole_tiles(x_TI.shape[-1])),
        )
        outputs, num_experts = contract_EFO.shape[-1], len(expand_EIF)
        return _unpack(result, outputs, num_experts, top_k, x_TI)

    def linear_mixture(self, x_GTF: Tensor, mixture: LinearMixture, top_k: int) -> Mixed:
        if torch.is_grad_enabled() or x_GTF.numel() == 0:
            return super().linear_mixture(x_GTF, mixture, top_k)
        operations = self._operations()
        prepared = operations.device.prepare(
            [matrix for matrix in mixture if matrix is not None],
            self.precision,
            lambda: operations.upload_mixture(mixture),
        )
        num_experts, features, outputs = mixture.direct_GEFO.shape[1:]
        result = self._run(
            lambda x: operations.linear_mixture(x, prepared, num_experts, top_k),
            ("mixture", id(prepared), top_k),
            _columns(x_GTF, whole_tiles(features)).unsqueeze(0),
        )
        return _unpack(result.squeeze(0), outputs, num_experts, top_k, x_GTF)

    def _operations(self) -> "Operations":
        device = the_device()
        from .operations import Numbers, Operations

        return Operations(device, Numbers.of(self.precision))

    def _prepare_experts(
        self, operations: "Operations", expand_EIF: Tensor, contract_EFO: Tensor
    ) -> Dict[str, Any]:
        return operations.device.prepare(
            [expand_EIF, contract_EFO],
            self.precision,
            lambda: operations.upload_experts(expand_EIF, contract_EFO),
        )

    def _run(self, program: Callable[[Any], Any], key: Hashable, values: Tensor) -> Tensor:
        """The device's answer, in the precision asked for."""
        operations = self._operations()
        return operations.device.run(
            program, (self.precision, key), values, operations.numbers.activations
        )


def _columns(x: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(x.float(), (0, columns - x.shape[-1]))


def _unpack(packed: Tensor, outputs: int, num_experts: int, top_k: int, like: Tensor) -> Mixed:
    """What the device joined: outputs, and scores and weights of all experts."""
    packed = packed.to(like)
    y = packed[..., :outputs]
    if num_experts == 1:
        ones = torch.ones_like(packed[..., :1])
        return Mixed(y, ones, torch.zeros_like(ones, dtype=torch.long), ones)
    scores, weights = packed[..., whole_tiles(outputs) :].chunk(2, dim=-1)
    scores, weights = scores[..., :num_experts], weights[..., :num_experts]
    if top_k == num_experts:
        ids = torch.arange(num_experts, device=like.device).expand_as(weights)
        return Mixed(y, weights, ids, scores)
    chosen, ids = weights.topk(top_k, dim=-1)
    return Mixed(y, chosen, ids, scores)
