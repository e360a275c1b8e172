"""UAVM as released: its tensors as parameters of `Uavm`."""

from collections.abc import Mapping

import numpy as np

from avjax.models.base import Output
from avjax.models.fusions.uavm import Uavm
from benchmarks.torch import fusions as torch_fusions
from tests.references.layouts import dense, norm

_STACKS = {"audio": "a_trans.", "video": "v_trans.", "shared": "s_trans."}

IGNORED = {
    "s_trans.in_proj.weight": "the shared layers are as wide as what they read, so nothing is projected",
    "s_trans.in_proj.bias": "as its weight",
} | {
    f"{stack}mlp_head.{i}.{kind}": "a stream's own classifier; the answer comes from the shared one"
    for stack in ("a_trans.", "v_trans.")
    for i in (0, 1)
    for kind in ("weight", "bias")
}
reference = torch_fusions.uavm


def module(hyper) -> Uavm:
    return Uavm(
        classes=hyper["label_dim"],
        width=hyper["embed_dim"],
        heads=hyper["num_heads"],
        depth=hyper["depth_i"],
        shared_depth=hyper["depth_s"],
        positions=hyper["a_seq_len"],
    )


def batch(inputs: Mapping[str, np.ndarray], hyper) -> dict[str, np.ndarray]:
    return dict(inputs) | {f"{s}_mask": np.ones(x.shape[:2], bool) for s, x in inputs.items()}


def answers(output: Output) -> dict:
    return {f"logits_{s}": output.logits[s] for s in ("audio", "video")}


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    """`state` holds the position embeddings too, as "buffer/a_trans.pos_embed" and so on."""
    depths = {"audio": hyper["depth_i"], "video": hyper["depth_i"], "shared": hyper["depth_s"]}
    stacks = {name: _stack(state, at, depths[name], hyper["num_heads"]) for name, at in _STACKS.items()}
    for stream in ("audio", "video"):
        stacks[stream]["project"] = dense(state, f"{_STACKS[stream]}in_proj")
    return stacks | {"head_norm": norm(state, "s_trans.mlp_head.0"), "head": dense(state, "s_trans.mlp_head.1")}


def _stack(state, at: str, depth: int, heads: int) -> dict:
    blocks = {f"block_{i}": _block(state, f"{at}blocks.{i}.", heads) for i in range(depth)}
    return blocks | {"norm": norm(state, f"{at}in_layernorm"), "positions": state[f"buffer/{at}pos_embed"][0]}


def _block(state, at: str, heads: int) -> dict:
    width = state[f"{at}norm1.weight"].shape[0]
    split = (heads, width // heads)
    parts = state[f"{at}attn.qkv.weight"].reshape(3, width, width)
    attention = {
        name: {"kernel": part.T.reshape(width, *split)}
        for name, part in zip(("query", "key", "value"), parts, strict=True)
    }
    out = dense(state, f"{at}attn.proj")
    attention["out"] = {"kernel": out["kernel"].reshape(*split, width), "bias": out["bias"]}
    return {
        "attention_norm": norm(state, f"{at}norm1"),
        "attention": attention,
        "norm": norm(state, f"{at}norm2"),
        "up": dense(state, f"{at}mlp.fc1"),
        "down": dense(state, f"{at}mlp.fc2"),
    }
