"""Routing and expert matrices in plain torch, for CPU and CUDA."""

import torch
from torch import Tensor


class TorchBackend:
    """The implementation that every other backend is tested against; see ``Backend``."""

    name = "torch"

    def route(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if top_k == logits_TE.shape[-1]:
            ids_TK = torch.arange(top_k, device=logits_TE.device).expand_as(logits_TE)
            return logits_TE.softmax(dim=-1), ids_TK
        chosen_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
        return chosen_TK.softmax(dim=-1), ids_TK

    def expert_linear(self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        x_ETI, bias_E1O = self._one_input_each(x, weight_EIO), bias_EO.unsqueeze(-2)
        if weight_EIO.dim() == 3:
            return torch.baddbmm(bias_E1O, x_ETI.expand(len(weight_EIO), -1, -1), weight_EIO)
        return x_ETI @ weight_EIO + bias_E1O

    def mix_linear(
        self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor, weights_TE: Tensor
    ) -> Tensor:
        # Weighting the inputs instead of the outputs leaves one product over all experts:
        # [T, E*I] @ [E*I, O], with no [E, T, O] in memory.
        x_ETI = self._one_input_each(x, weight_EIO)
        weighted_TEI = x_ETI.transpose(-3, -2) * weights_TE.unsqueeze(-1)
        weight_EI_O = weight_EIO.flatten(-3, -2)
        return weighted_TEI.flatten(-2) @ weight_EI_O + weights_TE @ bias_EO

    @staticmethod
    def _one_input_each(x: Tensor, weight_EIO: Tensor) -> Tensor:
        return x if x.dim() == weight_EIO.dim() else x.unsqueeze(-3)
