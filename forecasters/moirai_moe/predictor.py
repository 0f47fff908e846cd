"""Forecasts with MOIRAI-MoE, from published checkpoints too."""

import json
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar, Union

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...backends import get_backend
from ..fields import WindowConfig
from ..predictor import MoEPredictor
from ..serialization import check_weights
from .config import MoiraiMoEConfig
from .network import MoiraiMoENetwork
from .published import (
    check_uni2ts_can_compute,
    load_published,
    settings_from_published,
    settings_to_published,
    shapes_of_published,
    to_published,
)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

P = TypeVar("P", bound="MoiraiMoEPredictor")


class MoiraiMoEPredictor(MoEPredictor):
    """Forecasts of a :class:`MoiraiMoENetwork`; see :class:`MoEPredictor`.

    Horizons within one patch are forecast as distributions, longer ones as paths.
    """

    @classmethod
    def from_pretrained(
        cls: Type[P],
        source: Union[str, Path],
        prediction_length: int,
        context_length: int = 512,
        num_samples: int = 100,
        patch_size: Union[int, str] = "auto",
        decoding: str = "cached",
        freq: Optional[str] = None,
        target_dim: int = 1,
        num_feat_dynamic_real: int = 0,
        num_past_feat_dynamic_real: int = 0,
        lead_time: int = 0,
        batch_size: int = 32,
        device: str = "auto",
        backend: str = "auto",
        **hub: Any,
    ) -> P:
        """A predictor with the weights of a published checkpoint.

        Parameters
        ----------
        source
            A folder with ``config.json`` and ``model.safetensors``, or the name of one on the
            Hugging Face hub, such as ``"Salesforce/moirai-moe-1.0-R-small"``.
        prediction_length, context_length
            Steps to forecast, and steps to read.
        num_samples
            Paths of each forecast.
        patch_size
            One of the checkpoint's, or ``"auto"`` for the one that best forecasts the end of each
            series' history.
        decoding
            ``"cached"`` or ``"reencode"``; see :mod:`moecast.forecasters.moirai_moe.decoding`.
        freq
            Frequency of the series; only needed where their ``start`` is no period.
        target_dim, num_feat_dynamic_real, num_past_feat_dynamic_real, lead_time
            As for :class:`MoEEstimator`.
        batch_size, device
            As for :class:`MoEPredictor`.
        backend
            As for :class:`MoEEstimator`.
        **hub
            For ``huggingface_hub.hf_hub_download``: ``revision``, ``cache_dir``,
            ``local_files_only``, ``token`` and so on.

        Raises
        ------
        ValueError
            If the checkpoint cannot be found or read, is no MOIRAI-MoE model, or does not allow
            these settings.
        BackendUnavailableError
            If the backend is named and this machine lacks it.
        """
        get_backend(backend)
        window = WindowConfig(
            freq=freq,
            prediction_length=prediction_length,
            context_length=context_length,
            lead_time=lead_time,
            target_dim=target_dim,
            num_feat_dynamic_real=num_feat_dynamic_real,
            num_past_feat_dynamic_real=num_past_feat_dynamic_real,
        )
        checkpoint = PublishedCheckpoint(source, **hub)
        network = checkpoint.network(window, patch_size, decoding, backend)
        return cls(network, batch_size, device, num_samples=num_samples)

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write ``config.json`` and ``model.safetensors`` as published, for uni2ts and for us.

        Raises
        ------
        ValueError
            If the published format cannot hold this network.
        """
        save_pretrained(self.network, folder)


class PublishedCheckpoint:
    """A checkpoint in the published format, its settings read and its weights not yet.

    Parameters
    ----------
    source, **hub
        As for :meth:`MoiraiMoEPredictor.from_pretrained`.

    Attributes
    ----------
    settings
        Arguments of :class:`MoiraiMoEConfig` that the checkpoint fixes.

    Raises
    ------
    ValueError
        If it cannot be found, or ``config.json`` describes no MOIRAI-MoE model.
    """

    def __init__(self, source: Union[str, Path], **hub: Any) -> None:
        self.name = str(source)
        config, self._weights = _locate(source, hub)
        try:
            described = json.loads(config.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config} is damaged: {error}") from None
        if not isinstance(described, dict):
            raise ValueError(f"{config} is damaged: it holds no settings")
        self.settings: Dict[str, Any] = settings_from_published(described, str(config))

    def choose_patch_sizes(
        self, patch_size: Union[int, str, List[int]], context_length: int
    ) -> Tuple[int, ...]:
        """The patch sizes to forecast with.

        Raises
        ------
        ValueError
            If the checkpoint has no weights for them.
        """
        trained = self.settings["trained_patch_sizes"]
        if patch_size == "auto":
            fitting = tuple(size for size in trained if size <= context_length)
            return fitting or (min(trained),)
        asked: Tuple[Any, ...] = (
            tuple(patch_size) if isinstance(patch_size, (list, tuple)) else (patch_size,)
        )
        if not set(asked) <= set(trained):
            raise ValueError(
                f"patch_size={patch_size!r} is none of {self.name}: choose "
                f"{' or '.join(map(str, trained))}, or 'auto'"
            )
        return asked

    def network(
        self,
        window: WindowConfig,
        patch_size: Union[int, str, List[int]],
        decoding: str,
        backend: str = "auto",
    ) -> MoiraiMoENetwork:
        """A network of the checkpoint's settings and weights, ready to forecast."""
        config = MoiraiMoEConfig(
            window=window,
            patch_sizes=self.choose_patch_sizes(patch_size, window.context_length),
            decoding=decoding,
            backend=backend,
            **self.settings,
        )
        network = MoiraiMoENetwork.on_meta(config)
        self.load_into(network)
        return network.eval()

    def load_into(self, network: MoiraiMoENetwork) -> None:
        """Load the weights into a network of the checkpoint's settings, also one without memory.

        Raises
        ------
        ValueError
            If the file is damaged, or holds other weights than the settings need.
        """
        weights = network.state_dict()
        try:
            with safe_open(str(self._weights), framework="pt") as opened:
                found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
                expected = shapes_of_published(weights, network.config)
                check_weights(expected, found, str(self._weights))
                if network.norm.weight.is_meta:
                    network.materialise()
                    weights = network.state_dict()
                load_published(weights, network.config, opened.get_tensor)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._weights} is damaged: {error}") from None


def save_pretrained(network: nn.Module, folder: Union[str, Path]) -> None:
    """Write a network in the published format; see :meth:`MoiraiMoEPredictor.save_pretrained`."""
    assert isinstance(network, MoiraiMoENetwork)
    if network.kept_experts:
        raise ValueError(
            "the published format has as many experts in every layer, but some of this network's "
            "were pruned: use serialize instead"
        )
    settings = settings_to_published(network.config)
    published = to_published(network.state_dict(), network.config)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / _CONFIG).write_text(json.dumps(settings, indent=2))
    safetensors.torch.save_file(published, str(path / _WEIGHTS), metadata={"format": "pt"})


def network_from_uni2ts(
    module: nn.Module,
    window: WindowConfig,
    patch_size: Union[int, str] = "auto",
    decoding: str = "cached",
) -> MoiraiMoENetwork:
    """A network with the weights of a live uni2ts ``MoiraiMoEModule``.

    Parameters
    ----------
    window
        What is to be forecast.
    patch_size, decoding
        As for :meth:`MoiraiMoEPredictor.from_pretrained`.
    """
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)  # type: ignore[operator]
        return PublishedCheckpoint(folder).network(window, patch_size, decoding)


def network_to_uni2ts(network: MoiraiMoENetwork) -> nn.Module:
    """A uni2ts ``MoiraiMoEModule`` with a network's weights; needs uni2ts installed.

    Raises
    ------
    ValueError
        If uni2ts would compute something else.
    """
    check_uni2ts_can_compute(network.state_dict(), network.config)
    from uni2ts.model.moirai_moe import MoiraiMoEModule

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(network, folder)
        return MoiraiMoEModule.from_pretrained(folder)


def _locate(source: Union[str, Path], hub: Dict[str, Any]) -> Tuple[Path, Path]:
    """The two files of a checkpoint."""
    folder = Path(source)
    if str(source) and folder.is_dir():
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is no published checkpoint: it has no {name!r}")
        return folder / _CONFIG, folder / _WEIGHTS
    name = str(source)
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"{name!r} is neither a folder nor the name of a model on the Hugging Face hub, such "
            "as 'Salesforce/moirai-moe-1.0-R-small'"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Its transport's errors have no name that the library promises, but are what its own are.
    hub_errors: Any = (*HfHubHTTPError.__mro__[:2], HFValidationError, OSError)
    try:
        files = [Path(hf_hub_download(name, file, **hub)) for file in (_CONFIG, _WEIGHTS)]
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name!r} is not in the cache and cannot be downloaded, because this machine is "
            "offline or was told to be: download it where there is a network and give its folder"
        ) from error
    except hub_errors as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name!r} cannot be downloaded: {reason}") from error
    return files[0], files[1]
