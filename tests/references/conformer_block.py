"""The popular Conformer block: its tensors as parameters of `ConformerBlock`, and itself restated in PyTorch."""

from collections.abc import Mapping

import jax
import numpy as np

from avjax.layers import ConformerBlock
from tests.references.layouts import dense, norm

IGNORED: dict[str, str] = {}

_FIRST, _ATTENTION, _CONVOLUTION, _SECOND, _NORM = (f"sequential.{i}." for i in range(5))
_HEADS = ("query", "key", "value")


def module(hyper) -> ConformerBlock:
    return ConformerBlock(
        heads=hyper["num_attention_heads"],
        kernel=hyper["conv_kernel_size"],
        expansion=hyper["feed_forward_expansion_factor"],
        legacy_relative=True,
    )


def batch(inputs: Mapping[str, np.ndarray], hyper) -> tuple[np.ndarray, np.ndarray]:
    """The two arguments of the module: steps and a mask that is True throughout."""
    return inputs["x"], np.ones(inputs["x"].shape[:2], bool)


def answers(output: jax.Array) -> dict[str, jax.Array]:
    return {"y": output}


def convert(state: Mapping[str, np.ndarray], hyper) -> dict:
    heads, width = hyper["num_attention_heads"], hyper["encoder_dim"]
    split = (heads, width // heads)
    inner, conv = f"{_ATTENTION}module.attention.", f"{_CONVOLUTION}module.sequential."
    attention = {
        name: {
            "kernel": state[f"{inner}{name}_proj.linear.weight"].T.reshape(width, *split),
            "bias": state[f"{inner}{name}_proj.linear.bias"].reshape(split),
        }
        for name in _HEADS
    }
    attention |= {
        "position": {"kernel": state[f"{inner}pos_proj.linear.weight"].T.reshape(width, *split)},
        "content_bias": state[f"{inner}u_bias"],
        "position_bias": state[f"{inner}v_bias"],
        "out": {
            "kernel": state[f"{inner}out_proj.linear.weight"].T.reshape(*split, width),
            "bias": state[f"{inner}out_proj.linear.bias"],
        },
    }
    return {
        "first": _feed_forward(state, f"{_FIRST}module.sequential."),
        "attention_norm": norm(state, f"{_ATTENTION}module.layer_norm"),
        "attention": attention,
        "convolution": {
            "norm": norm(state, f"{conv}0"),
            "gate": dense(state, f"{conv}2.conv"),
            "depthwise": {"kernel": state[f"{conv}4.conv.weight"].transpose(2, 1, 0)},
            "depthwise_norm": norm(state, f"{conv}5"),
            "out": dense(state, f"{conv}7.conv"),
        },
        "second": _feed_forward(state, f"{_SECOND}module.sequential."),
        "norm": norm(state, "sequential.4"),
    }


def statistics(state: Mapping[str, np.ndarray], hyper) -> dict:
    """The collection "batch_stats"."""
    at = f"{_CONVOLUTION}module.sequential.5.running_"
    return {"convolution": {"depthwise_norm": {"mean": state[f"{at}mean"], "var": state[f"{at}var"]}}}


def _feed_forward(state, at: str) -> dict:
    return {
        "norm": norm(state, f"{at}0"),
        "up": dense(state, f"{at}1.linear"),
        "down": dense(state, f"{at}4.linear"),
    }


def reference(state: Mapping, inputs: Mapping, hyper) -> dict:
    """The published block on torch tensors, in evaluation mode."""
    from torch.nn import functional as F

    get = lambda name: state[name]  # noqa: E731
    norm = lambda x, at: F.layer_norm(x, x.shape[-1:], get(f"{at}weight"), get(f"{at}bias"))  # noqa: E731
    linear = lambda x, at: F.linear(x, get(f"{at}weight"), get(f"{at}bias"))  # noqa: E731

    def feed_forward(x, at):
        return linear(F.silu(linear(norm(x, f"{at}0."), f"{at}1.linear.")), f"{at}4.linear.")

    x = inputs["x"]
    x = x + feed_forward(x, f"{_FIRST}module.sequential.") / 2
    x = x + _torch_attention(state, norm(x, f"{_ATTENTION}module.layer_norm."), hyper["num_attention_heads"])
    at = f"{_CONVOLUTION}module.sequential."
    y = norm(x, f"{at}0.").transpose(1, 2)
    y = F.glu(F.conv1d(y, get(f"{at}2.conv.weight"), get(f"{at}2.conv.bias")), 1)
    y = F.conv1d(y, get(f"{at}4.conv.weight"), padding=hyper["conv_kernel_size"] // 2, groups=y.shape[1])
    running = (get(f"{at}5.running_mean"), get(f"{at}5.running_var"))
    y = F.silu(F.batch_norm(y, *running, get(f"{at}5.weight"), get(f"{at}5.bias")))
    x = x + F.conv1d(y, get(f"{at}7.conv.weight"), get(f"{at}7.conv.bias")).transpose(1, 2)
    x = x + feed_forward(x, f"{_SECOND}module.sequential.") / 2
    return {"y": norm(x, _NORM)}


def _torch_attention(state, x, heads: int):
    import torch

    at = f"{_ATTENTION}module.attention."
    b, n, width = x.shape
    weight = lambda name: state[f"{at}{name}_proj.linear.weight"]  # noqa: E731
    bias = lambda name: state[f"{at}{name}_proj.linear.bias"]  # noqa: E731
    query, key, value = ((x @ weight(s).T + bias(s)).view(b, n, heads, -1) for s in _HEADS)
    angle = torch.arange(n)[:, None] / 1e4 ** (torch.arange(0, width, 2) / width)
    waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
    place = (waves @ weight("pos").T).view(n, heads, -1)
    content = torch.einsum("bqhd,bkhd->bhqk", query + state[f"{at}u_bias"], key)
    position = torch.einsum("bqhd,khd->bhqk", query + state[f"{at}v_bias"], place)
    # Read row after row with a zero before each, n numbers at a time: the shift that wraps around.
    flat = torch.nn.functional.pad(position, (1, 0)).reshape(b, heads, -1)
    weights = torch.softmax((content + flat[..., n:].reshape(b, heads, n, n)) / width**0.5, -1)
    context = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, n, width)
    return context @ weight("out").T + bias("out")
