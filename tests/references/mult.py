"""MulT (Tsai et al., ACL 2019) as released: its names, and its tensors as parameters of ours."""

from collections.abc import Mapping

import numpy as np

from avjax.models.fusions.mult import MulT
from benchmarks.torch import fusions as torch_fusions
from tests.references import layouts

STREAMS = {"l": "text", "a": "audio", "v": "video"}
IGNORED = {
    f"{name}.version": "a format number kept as a buffer"
    for name in [f"trans_{s}_{kind}" for s in STREAMS for kind in ("mem", *(f"with_{o}" for o in STREAMS if o != s))]
}
reference = torch_fusions.mult


def encoder(state: layouts.State, name: str, heads: int) -> dict:
    """A transformer encoder, with the mixing numbers of AuxFormer where it has them."""
    params = {"norm": layouts.norm(state, f"{name}.layer_norm")}
    i = 0
    while f"{name}.layers.{i}.fc1.weight" in state:
        layer = f"{name}.layers.{i}"
        params[f"layer_{i}"] = {
            "attention": layouts.attention(state, f"{layer}.self_attn", heads),
            "attention_norm": layouts.norm(state, f"{layer}.layer_norms.0"),
            "norm": layouts.norm(state, f"{layer}.layer_norms.1"),
            "up": layouts.dense(state, f"{layer}.fc1"),
            "down": layouts.dense(state, f"{layer}.fc2"),
        } | ({"mix": state[f"{layer}.alpha"]} if f"{layer}.alpha" in state else {})
        i += 1
    return params


def convert(state: layouts.State, hyper: Mapping) -> dict:
    params = {
        "fuse": {"hidden_0": layouts.dense(state, "proj1"), "out": layouts.dense(state, "proj2")},
        "head": layouts.dense(state, "out_layer"),
    }
    for s, stream in STREAMS.items():
        params[f"project_{stream}"] = layouts.dense(state, f"proj_{s}")
        params[f"{stream}_memory"] = encoder(state, f"trans_{s}_mem", hyper["num_heads"])
        for o, other in STREAMS.items():
            if o != s:
                params[f"{stream}_with_{other}"] = encoder(state, f"trans_{s}_with_{o}", hyper["num_heads"])
    return params


def module(hyper: Mapping) -> MulT:
    return MulT(
        hyper["output_dim"],
        width=hyper["d_model"],
        heads=hyper["num_heads"],
        layers=hyper["layers"],
        causal=hyper["attn_mask"],
        as_released=True,
    )


def batch(inputs: Mapping[str, np.ndarray], hyper: Mapping) -> dict[str, np.ndarray]:
    streams = {"text": inputs["text"], "audio": inputs["audio"], "video": inputs["vision"]}
    return streams | {f"{s}_mask": np.ones(x.shape[:2], bool) for s, x in streams.items()}


def answers(output) -> dict[str, np.ndarray]:
    return {"logits": output.logits["fusion"], "hidden": output.features["joint"]}
