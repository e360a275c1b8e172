"""Converts parameters of our fusions to the tensors of the released systems, which `fusions` computes with.

A function takes `params` and, with norms over a batch, `batch_stats`, nested dictionaries of arrays, and returns
{released name: array}, without tensors that no output depends on. Parameters of a released system that ours folds into
others are neutral: a second bias is zero, a norm is the identity. They are not trained (`trains`), so that both sides
make the same update.
"""

from collections.abc import Mapping

import numpy as np

Params = Mapping
State = dict[str, np.ndarray]
_STREAMS = {"l": "text", "a": "audio", "v": "video"}


def trains(name: str) -> bool:
    """Returns whether ours has such a parameter: not running statistics or parameters that are folded into others."""
    return not any(part in name for part in ("running_", "bias_hh", "_subnet.norm."))


def layers(named: Mapping[str, Params]) -> State:
    """Converts linear layers, convolutions over time and norms, given by their released names."""
    out = {}
    for name, params in named.items():
        out |= {f"{name}.{_KINDS[kind]}": values.T for kind, values in params.items()}
    return out


_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _flat(layer: Params, inputs: int = 1) -> Params:
    """Flattens a dense layer from and to heads; `inputs` counts its input axes."""
    kernel = layer["kernel"]
    flat = {"kernel": kernel.reshape(np.prod(kernel.shape[:inputs]), -1)}
    return flat | ({"bias": layer["bias"].reshape(-1)} if "bias" in layer else {})


def _side_by_side(params: Params, *names: str) -> Params:
    """Joins layers from the same vector to heads into one dense layer."""
    flat = [_flat(params[name]) for name in names]
    return {kind: np.concatenate([layer[kind] for layer in flat], -1) for kind in flat[0]}


def _attention(name: str, params: Params) -> State:
    """Converts attention to the layout with query, key and value in one matrix."""
    joint = _side_by_side(params, "query", "key", "value")
    out = layers({f"{name}.out_proj": _flat(params["out"], 2)})
    return out | {f"{name}.in_proj_weight": joint["kernel"].T, f"{name}.in_proj_bias": joint["bias"]}


def _lstm(name: str, params: Params, suffix: str = "") -> State:
    layer = _flat(params["input"])
    weights = {"weight_ih": layer["kernel"].T, "weight_hh": params["kernel"].T, "bias_ih": layer["bias"]}
    return {f"{name}.{k}{suffix}": v for k, v in (weights | {"bias_hh": np.zeros_like(layer["bias"])}).items()}


# ---- Products: LMF and TFN ------------------------------------------------------------------------------------------


def _unimodal(params: Params) -> State:
    """Converts the unimodal parts; audio and video begin with a norm, to whose variance PyTorch adds 1e-5."""
    state = _lstm("text_subnet.rnn", params["text_states"], "_l0") | layers({"text_subnet.linear_1": params["text"]})
    for stream in ("audio", "video"):
        ones = np.ones(len(params[f"{stream}_0"]["kernel"]), np.float32)
        norm = {"scale": ones, "bias": 0 * ones, "mean": 0 * ones, "var": ones - np.float32(1e-5)}
        dense = {f"{stream}_subnet.linear_{i + 1}": params[f"{stream}_{i}"] for i in range(3)}
        state |= layers({f"{stream}_subnet.norm": norm} | dense)
    return state


def lmf(params: Params) -> State:
    """Converts LMF."""
    factors = {f"{s}_factor": params[f"factor_{s}"] for s in _STREAMS.values()}
    fusion = {"fusion_weights": params["weights"], "fusion_bias": params["bias"][None]}
    return _unimodal(params["unimodal"]) | factors | fusion


def tfn(params: Params) -> State:
    """Converts TFN."""
    ours = ("hidden_0", "hidden_1", "head")
    return _unimodal(params["unimodal"]) | layers(
        {f"post_fusion_layer_{i}": params[name] for i, name in enumerate(ours, 1)}
    )


# ---- Memory: MFN ----------------------------------------------------------------------------------------------------


def mfn(params: Params) -> State:
    """Converts MFN."""
    state = layers({"out_fc1": params["output"], "out_fc2": params["head"]})
    for s, stream in _STREAMS.items():
        state |= _lstm(f"lstm_{s}", params[f"{stream}_states"])
    for name, ours in (("att1", params["attention"]), ("att2", params["proposal"])):
        state |= layers({f"{name}_fc1": ours["hidden"], f"{name}_fc2": ours["out"]})
    for name, gate in (("gamma1", params["retain"]), ("gamma2", params["update"])):
        first = gate["input"] | {"kernel": np.concatenate([gate["input"]["kernel"], gate["memory"]])}
        state |= layers({f"{name}_fc1": first, f"{name}_fc2": {"kernel": gate["out"], "bias": gate["out_bias"]}})
    return state


# ---- Crossmodal transformers: MulT and AuxFormer --------------------------------------------------------------------


def _encoder(name: str, params: Params) -> State:
    state = layers({f"{name}.layer_norm": params["norm"]})
    for i in range(len(params) - 1):
        ours, layer = params[f"layer_{i}"], f"{name}.layers.{i}"
        state |= _attention(f"{layer}.self_attn", ours["attention"])
        norms = {f"{layer}.layer_norms.0": ours["attention_norm"], f"{layer}.layer_norms.1": ours["norm"]}
        state |= layers(norms | {f"{layer}.fc1": ours["up"], f"{layer}.fc2": ours["down"]})
        state |= {f"{layer}.alpha": ours["mix"]} if "mix" in ours else {}
    return state


def mult(params: Params) -> State:
    """Converts MulT."""
    fuse = params["fuse"]
    state = layers({"proj1": fuse["hidden_0"], "proj2": fuse["out"], "out_layer": params["head"]})
    for s, stream in _STREAMS.items():
        state |= layers({f"proj_{s}": params[f"project_{stream}"]})
        state |= _encoder(f"trans_{s}_mem", params[f"{stream}_memory"])
        for o, other in _STREAMS.items():
            state |= _encoder(f"trans_{s}_with_{o}", params[f"{stream}_with_{other}"]) if o != s else {}
    return state


def auxformer(params: Params) -> State:
    """Converts AuxFormer."""
    state = layers({"conv_1d_a": params["project_audio"]})
    for s, stream, o, other in (("a", "audio", "v", "video"), ("v", "video", "a", "audio")):
        state |= _encoder(f"{s}_mem", params[f"{stream}_alone"])
        state |= _encoder(f"trans_{s}_mem", params[f"{stream}_memory"])
        state |= _encoder(f"trans_{s}_with_{o}", params[f"{stream}_with_{other}"])
    fuse, alone = params["fuse"], params["auxiliary"]
    state |= layers({"proj1": fuse["hidden_0"], "proj2": fuse["out"]})
    state |= layers({f"proj_aux{i}": alone[name] for i, name in enumerate(("hidden_0", "hidden_1", "out"), 1)})
    return state | layers({"out_layer": params["head_fusion"], "out_layer_aux": params["head_auxiliary"]})


# ---- A shared transformer: UAVM -------------------------------------------------------------------------------------


def uavm(params: Params) -> State:
    """Converts UAVM."""
    state = layers({"s_trans.mlp_head.0": params["head_norm"], "s_trans.mlp_head.1": params["head"]})
    for stack, ours in (("a_trans", "audio"), ("v_trans", "video"), ("s_trans", "shared")):
        state |= _positioned(stack, params[ours])
    return state


def _positioned(stack: str, params: Params) -> State:
    state = layers({f"{stack}.in_layernorm": params["norm"]}) | {f"buffer/{stack}.pos_embed": params["positions"][None]}
    state |= layers({f"{stack}.in_proj": params["project"]}) if "project" in params else {}
    for i in range(sum(name.startswith("block_") for name in params)):
        ours, block = params[f"block_{i}"], f"{stack}.blocks.{i}"
        joint = _side_by_side(ours["attention"], "query", "key", "value")
        state |= layers({f"{block}.attn.qkv": joint, f"{block}.attn.proj": _flat(ours["attention"]["out"], 2)})
        state |= layers({f"{block}.norm1": ours["attention_norm"], f"{block}.norm2": ours["norm"]})
        state |= layers({f"{block}.mlp.fc1": ours["up"], f"{block}.mlp.fc2": ours["down"]})
    return state


# ---- Two convolutional stages: MMER and the released AVT-CA ---------------------------------------------------------


def mmer_ia(params: Params, batch_stats: Params) -> State:
    """Converts MMER's intermediate attention; the unused values of the released attention, half of a "kv", are zero."""
    state = _branches(params, batch_stats)
    for block, ours in (("av1", params["first_asks"]), ("va1", params["second_asks"])):
        key = _flat(ours["key"])["kernel"]
        values = {"kernel": np.concatenate([key, np.zeros_like(key)], -1)}
        state |= layers({f"{block}.q": _flat(ours["query"]), f"{block}.kv": values})
    return state


def mmer_it(params: Params, batch_stats: Params) -> State:
    """Converts MMER's intermediate transformer."""
    return (
        _branches(params, batch_stats)
        | _cross_attention("av1", params["first_asks"])
        | _cross_attention("va1", params["second_asks"])
    )


def mmer_lt(params: Params, batch_stats: Params) -> State:
    """Converts MMER's late transformer."""
    return (
        _branches(params, batch_stats)
        | _cross_attention("av", params["first_asks"])
        | _cross_attention("va", params["second_asks"])
    )


def avtca_released(params: Params, batch_stats: Params) -> State:
    """Converts the released AVT-CA."""
    return mmer_it(params, batch_stats) | _attention("finalAttention", params["final"])


def _branches(params: Params, batch_stats: Params) -> State:
    """Converts the convolutions of both streams, and the classifier."""
    state = layers({"classifier_1.0": params["head"]})
    for branch, ours in (("audio_model", "audio"), ("visual_model", "video")):
        for i in range(4):
            name, at = f"{ours}_{i // 2}_{i % 2}", f"{branch}.conv1d_{i}"
            norm = {**params[name]["norm"], **batch_stats[name]["norm"]}
            state |= layers({f"{at}.0": params[name]["conv"], f"{at}.1": norm})
    return state


def _cross_attention(name: str, params: Params) -> State:
    attention = {"attn.q": _flat(params["query"]), "attn.kv": _side_by_side(params, "key", "value")}
    attention |= {"attn.proj": _flat(params["out"], 2), "norm1_q": params["query_norm"], "norm1_k": params["key_norm"]}
    rest = {"norm2": params["norm"], "mlp.fc1": params["up"], "mlp.fc2": params["down"]}
    return layers({f"{name}.{k}": v for k, v in (attention | rest).items()})
