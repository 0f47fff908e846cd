"""Settings and weights as published checkpoints and uni2ts name them.

The format has a tensor for each expert and for each parameter of the head; here they are stacked.
"""

from typing import Any, Dict, List, Mapping, Tuple

import torch
from torch import Tensor

from ...distributions.head import Head
from ...distributions.published import head_from_published, head_to_published
from ..fields import WindowConfig
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
    if not problems and not all(type(size) is int and size > 0 for size in config["patch_sizes"]):
        problems.append(f"patch_sizes={config['patch_sizes']!r} are no sizes")
    if problems or not config["patch_sizes"]:
        raise ValueError(
            f"{origin} describes no MOIRAI-MoE model: {'; '.join(problems) or 'no patch_sizes'}"
        )
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
    window: WindowConfig = config.window
    if window.static_fields:
        raise ValueError(
            f"the published format has no static features, but this network reads "
            f"{', '.join(window.static_fields)}: use serialize instead"
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


def shapes_of_published(config: MoiraiMoEConfig) -> Dict[str, Tuple[int, ...]]:
    """Names and shapes of all published weights of a network."""
    sizes, largest = len(config.trained_patch_sizes), max(config.trained_patch_sizes)
    width, hidden = config.d_model, config.d_ff
    shapes: Dict[str, Tuple[int, ...]] = {
        "encoder.centroid": (config.num_layers, config.num_experts, width),
        "encoder.norm.weight": (width,),
    }
    for name, features in (("in_proj", largest), ("res_proj", largest), ("feat_proj", width)):
        shapes[f"{name}.weight"] = (sizes, width, features)
        shapes[f"{name}.bias"] = (sizes, width)
    for name, size in config.distr_output.args_dim.items():
        shapes[f"param_proj.proj.{name}.weight"] = (sizes, size * largest, width)
        shapes[f"param_proj.proj.{name}.bias"] = (sizes, size * largest)
    for i in range(config.num_layers):
        layer = f"encoder.layers.{i}"
        attention = f"{layer}.self_attn"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{attention}.{name}.weight"] = (width, width)
        for name in ("q_norm", "k_norm"):
            shapes[f"{attention}.{name}.weight"] = (width // config.num_heads,)
        shapes[f"{attention}.var_attn_bias.emb.weight"] = (2, config.num_heads)
        for name in ("norm1", "norm2"):
            shapes[f"{layer}.{name}.weight"] = (width,)
        for expert in range(config.num_experts):
            for name in ("fc1", "fc_gate"):
                shapes[f"{layer}.ffn.experts.{expert}.{name}.weight"] = (hidden, width)
            shapes[f"{layer}.ffn.experts.{expert}.fc2.weight"] = (width, hidden)
    return shapes


_PROJECTIONS = {
    "in_proj": "value_projection",
    "res_proj": "residual_projection",
    "feat_proj": "feature_projection",
}
_LAYER_WEIGHTS = {
    "self_attn.q_norm.weight": "attention.query_norm.weight",
    "self_attn.k_norm.weight": "attention.key_norm.weight",
    "self_attn.var_attn_bias.emb.weight": "attention.variate_bias",
    "self_attn.out_proj.weight": "attention.output.weight",
    "norm1.weight": "attention_norm.weight",
    "norm2.weight": "experts_norm.weight",
}


def weights_from_published(
    published: Mapping[str, Tensor], config: MoiraiMoEConfig
) -> Dict[str, Tensor]:
    """A network's state dict from published weights of the right names and shapes."""
    weights = {"norm.weight": published["encoder.norm.weight"]}
    for theirs, ours in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            weights[f"{ours}.{kind}"] = published[f"{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        parts = [
            published[f"param_proj.proj.{name}.{kind}"] for name in config.distr_output.args_dim
        ]
        weights[f"parameter_projection.{kind}"] = torch.cat(parts, dim=1)
    for i, centroids in enumerate(published["encoder.centroid"]):
        theirs, ours = f"encoder.layers.{i}", f"layers.{i}"
        weights[f"{ours}.router.centroids_EF"] = centroids
        for their_name, our_name in _LAYER_WEIGHTS.items():
            weights[f"{ours}.{our_name}"] = published[f"{theirs}.{their_name}"]
        weights[f"{ours}.attention.query_key_value.weight"] = torch.cat(
            [published[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        )
        experts = [f"{theirs}.ffn.experts.{e}" for e in range(config.num_experts)]
        weights[f"{ours}.experts.expand"] = torch.stack(
            [
                torch.cat([published[f"{e}.fc_gate.weight"], published[f"{e}.fc1.weight"]]).T
                for e in experts
            ]
        )
        weights[f"{ours}.experts.contract"] = torch.stack(
            [published[f"{e}.fc2.weight"].T for e in experts]
        )
    return weights


def weights_to_published(
    weights: Mapping[str, Tensor], config: MoiraiMoEConfig
) -> Dict[str, Tensor]:
    """Published weights from a network's state dict."""
    published = {"encoder.norm.weight": weights["norm.weight"]}
    for theirs, ours in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            published[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
    largest = max(config.trained_patch_sizes)
    sizes = [size * largest for size in config.distr_output.args_dim.values()]
    for kind in ("weight", "bias"):
        parts = weights[f"parameter_projection.{kind}"].split(sizes, dim=1)
        for name, part in zip(config.distr_output.args_dim, parts):
            published[f"param_proj.proj.{name}.{kind}"] = part
    layers = range(config.num_layers)
    published["encoder.centroid"] = torch.stack(
        [weights[f"layers.{i}.router.centroids_EF"] for i in layers]
    )
    for i in layers:
        theirs, ours = f"encoder.layers.{i}", f"layers.{i}"
        for their_name, our_name in _LAYER_WEIGHTS.items():
            published[f"{theirs}.{their_name}"] = weights[f"{ours}.{our_name}"]
        projections = weights[f"{ours}.attention.query_key_value.weight"].chunk(3)
        for name, projection in zip("qkv", projections):
            published[f"{theirs}.self_attn.{name}_proj.weight"] = projection
        expand, contract = (weights[f"{ours}.experts.{n}"] for n in ("expand", "contract"))
        for e in range(config.num_experts):
            gate, up = expand[e].T.chunk(2)
            expert = f"{theirs}.ffn.experts.{e}"
            published[f"{expert}.fc_gate.weight"] = gate
            published[f"{expert}.fc1.weight"] = up
            published[f"{expert}.fc2.weight"] = contract[e].T
    return {name: tensor.contiguous() for name, tensor in published.items()}
