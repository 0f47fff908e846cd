"""How routing and expert matrices are computed.

A backend is a handful of functions: tensors in, tensors out, no parameters of its own. Models
reach it through :func:`get_backend` only, so that a new device is a new module here and nothing
elsewhere.
"""

import os
from typing import Optional, Protocol

from torch import Tensor

from .errors import BackendUnavailableError, DeviceError
from .problems import LinearMixture, Mixed, Scoring
from .torch import TorchBackend

__all__ = [
    "BACKEND_NAMES",
    "Backend",
    "BackendUnavailableError",
    "DeviceError",
    "LinearMixture",
    "Mixed",
    "Scoring",
    "TorchBackend",
    "get_backend",
]

BACKEND_NAMES = ("auto", "torch", "ttnn")


class Backend(Protocol):
    """What every backend computes.

    Shapes are spelled in suffixes: T tokens, E experts, K experts chosen per token, I and O the
    input and output features of an expert. A leading ``*`` stands for any number of group
    dimensions (channels with weights of their own).

    Attributes
    ----------
    name
        What it is asked for by.
    folds
        Whether a network of linear maps should come as one :class:`LinearMixture`, instead of
        layer by layer.
    """

    name: str
    folds: bool

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

    def routed_ffn(
        self,
        x_TI: Tensor,
        scoring: Scoring,
        top_k: int,
        expand_EIF: Tensor,
        contract_EFO: Tensor,
    ) -> Mixed:
        """Score the experts, choose among them, and do as :meth:`gated_ffn`.

        Parameters
        ----------
        x_TI
            Tokens.
        scoring
            The router.
        top_k
            Experts chosen per token.
        expand_EIF, contract_EFO
            As for :meth:`gated_ffn`.
        """
        ...

    def linear_mixture(self, x_GTF: Tensor, mixture: LinearMixture, top_k: int) -> Mixed:
        """Compute a whole network of linear experts.

        Parameters
        ----------
        x_GTF
            ``[G, T, F]``, 1 where the last F is.
        mixture
            The network.
        top_k
            Experts chosen per token.

        Returns
        -------
        Mixed
            Each tensor with G before T.
        """
        ...


def get_backend(name: Optional[str] = None, precision: Optional[str] = None) -> Backend:
    """The backend called ``name``.

    Parameters
    ----------
    name
        ``"torch"``, ``"ttnn"`` for a Tenstorrent device, or ``"auto"`` (as ``None``) for what the
        environment variable ``MOECAST_BACKEND`` names, and the best that this machine has where it
        is not set: ttnn with a device, otherwise torch.
    precision
        Of ttnn: ``"bfloat16"`` (the default), ``"float32"``, or ``"bfloat8_b"`` for the experts'
        weights and bfloat16 for the rest. The others compute in the precision of their tensors.

    Raises
    ------
    ValueError
        If there is no such backend or precision.
    BackendUnavailableError
        If ttnn is asked for by name and cannot be had.
    """
    named_by = "backend"
    if name is None or name == "auto":
        name, named_by = os.environ.get("MOECAST_BACKEND") or "auto", "MOECAST_BACKEND"
    if name not in BACKEND_NAMES:
        raise ValueError(
            f"{named_by}={name!r} is unknown: choose one of {', '.join(BACKEND_NAMES)}"
        )
    if name != "torch":
        from .ttnn import TtnnBackend, find_device, what_is_missing

        backend = TtnnBackend(precision or "bfloat16")
        device, missing = find_device(), what_is_missing()
        if name == "ttnn" and missing:
            raise BackendUnavailableError(f"backend='ttnn' cannot be had: {missing}")
        # A mock device computes nothing, so nobody gets one who does not ask for it.
        if not missing and (name == "ttnn" or (device and device.kind != "mock")):
            return backend
    if precision is not None:
        raise ValueError(f"precision={precision!r} is a setting of backend='ttnn' alone")
    return TorchBackend()
