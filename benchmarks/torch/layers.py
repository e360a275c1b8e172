"""Layers of our baselines in plain PyTorch, and the conversion of our variables to their tensors.

As in `fusions` a system is a function of its named tensors, in evaluation mode, on inputs without padding. Names
are those of `restated.tensors`, but for attention and LSTMs, which have PyTorch's.
Shapes: b clip, n step of a stream (q queries, k keys), d width.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.torch.fusions import attention, layer_norm, linear, recurrent
from benchmarks.torch.restated import tensors

Tensor = Any
State = Mapping[str, Tensor]
STREAMS = ("text", "audio", "video")


# ---- Names --------------------------------------------------------------------------------------------------------


def named(params: Mapping, batch_stats: Mapping | None = None) -> dict[str, np.ndarray]:
    """Converts our variables as `tensors`, with query, key and value joined in one matrix, "in_proj_weight".

    An LSTM has PyTorch's four tensors; ours lacks "bias_hh", which is zero.
    """
    state = tensors(params, batch_stats)
    for at in [name.removesuffix("query.weight") for name in state if name.endswith(".query.weight")]:
        for kind in (kind for kind in ("weight", "bias") if f"{at}query.{kind}" in state):
            parts = [state.pop(f"{at}{part}.{kind}") for part in ("query", "key", "value")]
            state[f"{at}in_proj_{kind}"] = np.concatenate(parts)
    for at in [name.removesuffix("input.weight") for name in state if name.endswith(".input.weight")]:
        bias = state.pop(f"{at}input.bias")
        weights = {"weight_ih": state.pop(f"{at}input.weight"), "weight_hh": state.pop(f"{at}weight")}
        biases = {"bias_ih": bias, "bias_hh": np.zeros_like(bias)}
        state |= {f"{at}{name}": values for name, values in (weights | biases).items()}
    return state


# ---- Layers -------------------------------------------------------------------------------------------------------


def lstm(state: State, *names: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs an LSTM, or a bidirectional pair, over x (b, n, w): states (b, n, d) and the last (b, d)."""
    import torch

    weights = [tensor for name in names for tensor in recurrent(state, name)]
    zeros = x.new_zeros(len(names), len(x), weights[1].shape[1])
    states, last, _ = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, len(names) == 2, True)
    return states, last.transpose(0, 1).flatten(1)


def convolution(state: State, name: str, x: Tensor, groups: int = 1) -> Tensor:
    """Convolves the steps of x (b, n, d) with an odd kernel and zero padding: (b, n, d)."""
    from torch.nn import functional

    return functional.conv1d(x.mT, state[f"{name}.weight"], state.get(f"{name}.bias"), padding="same", groups=groups).mT


def joint_projections(state: State, name: str, x: Tensor, source: Tensor | None) -> tuple[Tensor, ...]:
    """Projects x to queries, and `source`, or x where it is None, to keys and values."""
    from torch.nn import functional

    weight, bias = state[f"{name}.in_proj_weight"], state.get(f"{name}.in_proj_bias")
    if source is None:
        return functional.linear(x, weight, bias).chunk(3, -1)
    width = len(weight) // 3
    own, others = (None, None) if bias is None else (bias[:width], bias[width:])
    return functional.linear(x, weight[:width], own), *functional.linear(source, weight[width:], others).chunk(2, -1)


def attend(
    state: State, name: str, heads: int, x: Tensor, source: Tensor | None = None, admitted: Tensor | None = None
) -> Tensor:
    """Attends from x (b, q, d) to source (b, k, d), or to itself: (b, q, d)."""
    return linear(state, f"{name}.out", attention(*joint_projections(state, name, x, source), heads, admitted))


def pre_norm(
    state: State, name: str, heads: int, x: Tensor, source: Tensor | None = None, admitted: Tensor | None = None
) -> Tensor:
    """Applies a layer with a norm before each branch; a `source` (b, k, d) has the same norm as x (b, q, d)."""
    normal = lambda x: layer_norm(state, f"{name}.attention_norm", x)  # noqa: E731
    attended = None if source is None else normal(source)
    x = x + attend(state, f"{name}.attention", heads, normal(x), attended, admitted)
    return x + feed_forward(state, name, layer_norm(state, f"{name}.norm", x))


def post_norm(state: State, name: str, heads: int, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Applies a layer with a norm after each sum; with a `source` (b, k, d) it is a decoder layer."""
    x = layer_norm(state, f"{name}.attention_norm", x + attend(state, f"{name}.attention", heads, x))
    if source is not None:
        attended = attend(state, f"{name}.source_attention", heads, x, source)
        x = layer_norm(state, f"{name}.source_norm", x + attended)
    return layer_norm(state, f"{name}.norm", x + feed_forward(state, name, x))


def feed_forward(state: State, name: str, x: Tensor) -> Tensor:
    """Applies two linear layers with a ReLU between them."""
    return linear(state, f"{name}.down", linear(state, f"{name}.up", x).relu())


def encoder(
    state: State, name: str, settings: Mapping, x: Tensor, admitted: Tensor | None = None, source: Tensor | None = None
) -> Tensor:
    """Applies layers of self-attention, or of attention to a source, to scaled steps with sinusoids, then a norm."""
    x, source = (None if steps is None else math.sqrt(steps.shape[-1]) * steps + waves(steps) for steps in (x, source))
    for i in range(settings["layers"]):
        x = pre_norm(state, f"{name}.layer_{i}", settings["heads"], x, source, admitted)
    return layer_norm(state, f"{name}.norm", x)


def waves(x: Tensor) -> Tensor:
    """Returns sinusoids (n, d) of the steps of x (b, n, d), numbered from 1."""
    import torch

    n, width = x.shape[1:]
    rate = torch.exp(torch.arange(width // 2, device=x.device) * (-math.log(10000) / (width // 2 - 1)))
    angle = torch.arange(1, n + 1, device=x.device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


def spans(x: Tensor, count: int) -> Tensor:
    """Averages `count` equal spans, overlapping where necessary: (b, n, d) → (b, count, d)."""
    from torch.nn import functional

    return functional.adaptive_avg_pool1d(x.mT, count).mT
