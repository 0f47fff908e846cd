"""How routing and expert matrices are computed.

A backend is a handful of functions: tensors in, tensors out, no parameters of its own. Models
reach it through :func:`get_backend` only, so that a new device is a new module here and nothing
elsewhere.
"""

import os
from typing import Optional, Protocol

from torch import Tensor

from .torch import TorchBackend

__all__ = ["BACKEND_NAMES", "Backend", "TorchBackend", "get_backend"]

BACKEND_NAMES = ("auto", "torch")


class Backend(Protocol):
    """What every backend computes.

    Shapes are spelled in suffixes: T tokens, E experts, K experts chosen per token, I and O the
    input and output features of an expert. A leading ``*`` stands for any number of group
    dimensions (channels with weights of their own).
    """

    name: str

    def route(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Choose ``top_k`` experts per token.

        Returns
        -------
        weights_TK, ids_TK
            Softmax of the chosen logits, and which experts they belong to: in any order, but in
            ascending order where ``top_k`` is E.
        """
        ...

    def expert_linear(self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        """Apply every expert's linear map.

        Parameters
        ----------
        x
            ``[*, T, I]``, the same input for every expert, or ``[*, E, T, I]``, one for each.

        Returns
        -------
        y_ETO
            ``[*, E, T, O]``.
        """
        ...

    def mix_linear(
        self, x: Tensor, weight_EIO: Tensor, bias_EO: Tensor, weights_TE: Tensor
    ) -> Tensor:
        """Apply every expert's linear map and add the results, weighted per token.

        Parameters
        ----------
        x
            ``[*, T, I]`` or ``[*, E, T, I]``, as for :meth:`expert_linear`.
        weights_TE
            ``[*, T, E]``.

        Returns
        -------
        y_TO
            ``[*, T, O]``.
        """
        ...

    def gated_ffn(
        self,
        x_TI: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Tensor:
        """Apply each token's chosen feed-forwards and add the results, weighted.

        A feed-forward is ``(SiLU(x @ gate) * (x @ up)) @ contract`` (Shazeer 2020), computed for
        chosen experts only.

        Parameters
        ----------
        x_TI, weights_TK, ids_TK
            Tokens, and the weights and numbers of the experts that each chose.
        expand_EIF
            ``[E, I, 2 H]``, the gate's H columns before those of the other branch.
        contract_EFO
            ``[E, H, O]``.

        Returns
        -------
        y_TO
            ``[T, O]``.
        """
        ...


def get_backend(name: Optional[str] = None) -> Backend:
    """The backend called ``name``.

    Parameters
    ----------
    name
        ``"torch"``, or ``"auto"`` (as ``None``) for what the environment variable
        ``MOECAST_BACKEND`` names, and the best that this machine has where it is not set.

    Raises
    ------
    ValueError
        If there is no such backend.
    """
    if name is None or name == "auto":
        name = os.environ.get("MOECAST_BACKEND") or "auto"
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKEND_NAMES)}")
    return TorchBackend()
