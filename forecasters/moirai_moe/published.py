"""Settings and weights as published checkpoints and uni2ts name them.

The format has a tensor for each expert and for each parameter of the head; here they are stacked.
"""

from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ...distributions.head import Head
from ...distributions.published import head_from_published, head_to_published
from .config import MoiraiMoEConfig

_HEAD_FEATURES = 64
_NUM_EXPERTS, _TOP_K = 32, 2

_TYPES: Dict[str, Tuple[type, ...]] = {
    "d_model": (int,),
    "d_ff": (int,),
    "num_layers": (int,),
    "max_seq_len": (int,),
    "patch_sizes": (list, tuple),
    "attn_dropout_p": (int, float),
    "dropout_p": (int, float),
    "scaling": (bool,),
    "distr_output": (dict,),
}
# Ours only, and written only where they are not what every published model has.
_OPTIONAL: Dict[str, Tuple[type, ...]] = {
    "num_heads": (int,),
    "num_experts": (int,),
    "num_experts_per_token": (int,),
    "covariates_ahead": (bool,),
}


def settings_from_published(config: Mapping[str, Any], origin: str) -> Dict[str, Any]:
    """Arguments of :class:`MoiraiMoEConfig` from a published ``config.json``.

    Raises
    ------
    ValueError
        If it describes another architecture, or names a head that is not known.
    """
    problems: List[str] = []
    for name in sorted(set(_TYPES) - {"scaling"} - set(config)):
        problems.append(f"{name!r} is missing")
    for name in sorted(set(config) - set(_TYPES) - set(_OPTIONAL)):
        problems.append(f"{name!r} is unknown")
    for name, types in {**_TYPES, **_OPTIONAL}.items():
        value = config.get(name)
        if name in config and (
            not isinstance(value, types) or (isinstance(value, bool) and types != (bool,))
        ):
            problems.append(f"{name}={value!r} is no {types[0].__name__}")
    if not problems:
        sizes = config["patch_sizes"]
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            problems.append(f"patch_sizes={sizes!r} are no sizes")
    if problems:
        raise ValueError(f"{origin} describes no MOIRAI-MoE model: {'; '.join(problems)}")
    try:
        head = head_from_published(config["distr_output"])
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return {
        "distr_output": head,
        "scaling": "regularised_std" if config.get("scaling", True) else "none",
        "trained_patch_sizes": tuple(config["patch_sizes"]),
        "d_model": config["d_model"],
        "d_ff": config["d_ff"],
        "num_layers": config["num_layers"],
        "num_heads": config.get("num_heads", max(config["d_model"] // _HEAD_FEATURES, 1)),
        "num_experts": config.get("num_experts", _NUM_EXPERTS),
        "top_k": config.get("num_experts_per_token", _TOP_K),
        "max_seq_len": config["max_seq_len"],
        "covariates_ahead": config.get("covariates_ahead", False),
        "dropout": float(config["dropout_p"]),
        "attention_dropout": float(config["attn_dropout_p"]),
    }


def settings_to_published(config: MoiraiMoEConfig) -> Dict[str, Any]:
    """A published ``config.json`` of a network's settings.

    Raises
    ------
    ValueError
        If the format cannot hold them.
    """
    if config.scaling not in ("regularised_std", "none"):
        raise ValueError(
            f"scaling={config.scaling!r} has no published format: train with "
            "scaling='regularised_std' or 'none', or use serialize"
        )
    if config.window.static_fields:
        raise ValueError(
            f"the published format has no static features, but this network reads "
            f"{', '.join(config.window.static_fields)}: use serialize instead"
        )
    if not isinstance(config.distr_output, Head):
        raise ValueError(
            f"distr_output={type(config.distr_output).__name__} has no published format"
        )
    published: Dict[str, Any] = {
        "attn_dropout_p": config.attention_dropout,
        "d_ff": config.d_ff,
        "d_model": config.d_model,
        "distr_output": head_to_published(config.distr_output),
        "dropout_p": config.dropout,
        "max_seq_len": config.max_seq_len,
        "num_layers": config.num_layers,
        "patch_sizes": list(config.trained_patch_sizes),
        "scaling": config.scaling != "none",
    }
    ours = {
        "num_heads": (config.num_heads, max(config.d_model // _HEAD_FEATURES, 1)),
        "num_experts": (config.num_experts, _NUM_EXPERTS),
        "num_experts_per_token": (config.top_k, _TOP_K),
        "covariates_ahead": (config.covariates_ahead, False),
    }
    published.update({name: value for name, (value, usual) in ours.items() if value != usual})
    return published


def check_uni2ts_can_compute(weights: Mapping[str, Tensor], config: MoiraiMoEConfig) -> None:
    """Refuse what the published format holds and uni2ts computes otherwise.

    Raises
    ------
    ValueError
        If the network has a setting that uni2ts does not know, or weights that it leaves out: of
        a parameter of several numbers, those behind the first steps of a smaller patch.
    """
    for name in sorted(set(settings_to_published(config)) & set(_OPTIONAL)):
        ours = "top_k" if name == "num_experts_per_token" else name
        raise ValueError(f"{ours}={getattr(config, ours)} is nothing that uni2ts computes")
    largest, start = max(config.trained_patch_sizes), 0
    for size in config.distr_output.args_dim.values():
        rows = weights["parameter_projection.weight"][:, start : start + size * largest]
        for patch_size, of_size in zip(config.trained_patch_sizes, rows):
            steps = torch.arange(len(of_size)) % largest < patch_size
            if of_size[size * patch_size :][steps[size * patch_size :]].any():
                raise ValueError(
                    f"patches of {patch_size} steps are nothing that uni2ts computes with this "
                    "head: it leaves out part of its weights"
                )
        start += size * largest


class _Place(NamedTuple):
    """Where a published tensor, or one layer of it, lies in a network."""

    name: str
    layer: Optional[int]
    ours: str
    view: Callable[[Tensor], Tensor]


def _places(config: MoiraiMoEConfig) -> Iterator[_Place]:
    def whole(tensor: Tensor) -> Tensor:
        return tensor

    def part(dim: int, start: int, length: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.narrow(dim, start, length)

    def of_expert(expert: int, start: int, length: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[expert].narrow(1, start, length).T

    yield _Place("encoder.norm.weight", None, "norm.weight", whole)
    for theirs, ours in (
        ("in_proj", "value_projection"),
        ("res_proj", "residual_projection"),
        ("feat_proj", "feature_projection"),
    ):
        for kind in ("weight", "bias"):
            yield _Place(f"{theirs}.{kind}", None, f"{ours}.{kind}", whole)
    largest, start = max(config.trained_patch_sizes), 0
    for name, size in config.distr_output.args_dim.items():
        rows = size * largest
        for kind in ("weight", "bias"):
            view = part(1, start, rows)
            ours = f"parameter_projection.{kind}"
            yield _Place(f"param_proj.proj.{name}.{kind}", None, ours, view)
        start += rows
    width, hidden = config.d_model, config.d_ff
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layers.{i}", f"layers.{i}"
        yield _Place("encoder.centroid", i, f"{ours}.router.centroids_EF", whole)
        for their_name, our_name in (
            ("self_attn.q_norm.weight", "attention.query_norm.weight"),
            ("self_attn.k_norm.weight", "attention.key_norm.weight"),
            ("self_attn.var_attn_bias.emb.weight", "attention.variate_bias"),
            ("self_attn.out_proj.weight", "attention.output.weight"),
            ("norm1.weight", "attention_norm.weight"),
            ("norm2.weight", "experts_norm.weight"),
        ):
            yield _Place(f"{theirs}.{their_name}", None, f"{ours}.{our_name}", whole)
        for j, letter in enumerate("qkv"):
            name, view = f"{theirs}.self_attn.{letter}_proj.weight", part(0, j * width, width)
            yield _Place(name, None, f"{ours}.attention.query_key_value.weight", view)
        for e in range(config.num_experts):
            expert = f"{theirs}.ffn.experts.{e}"
            for name, stack, view in (
                ("fc_gate", "expand", of_expert(e, 0, hidden)),
                ("fc1", "expand", of_expert(e, hidden, hidden)),
                ("fc2", "contract", of_expert(e, 0, width)),
            ):
                yield _Place(f"{expert}.{name}.weight", None, f"{ours}.experts.{stack}", view)


def shapes_of_published(
    weights: Mapping[str, Tensor], config: MoiraiMoEConfig
) -> Dict[str, List[int]]:
    """Names and shapes of the published weights of a network with these."""
    shapes = {}
    for place in _places(config):
        shape = list(place.view(weights[place.ours]).shape)
        shapes[place.name] = shape if place.layer is None else [config.num_layers, *shape]
    return shapes


def load_published(
    weights: Mapping[str, Tensor], config: MoiraiMoEConfig, read: Callable[[str], Tensor]
) -> None:
    """Write published weights into a network's state dict, one after the other.

    Parameters
    ----------
    read
        Gives a published tensor by its name; called once for each.
    """
    stacked: Dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer, ours, view in _places(config):
            if layer is None:
                view(weights[ours]).copy_(read(name))
                continue
            if name not in stacked:
                stacked[name] = read(name)
            view(weights[ours]).copy_(stacked[name][layer])


def to_published(weights: Mapping[str, Tensor], config: MoiraiMoEConfig) -> Dict[str, Tensor]:
    """Published weights from a network's state dict."""
    published: Dict[str, Tensor] = {}
    stacked: Dict[str, List[Tensor]] = {}
    for name, layer, ours, view in _places(config):
        tensor = view(weights[ours]).detach().cpu()
        if layer is None:
            published[name] = tensor.contiguous()
        else:
            stacked.setdefault(name, []).append(tensor)
    return {**published, **{name: torch.stack(layers) for name, layers in stacked.items()}}
