"""From PyTorch's layouts to ours: parts that several references share."""

from collections.abc import Mapping

import numpy as np

State = Mapping[str, np.ndarray]


def dense(state: State, name: str) -> dict[str, np.ndarray]:
    """A linear layer (out, in), or a convolution over single steps (out, in, 1)."""
    weight = state[f"{name}.weight"]
    kernel = {"kernel": weight.reshape(weight.shape[:2]).T}
    return kernel | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def norm(state: State, name: str) -> dict[str, np.ndarray]:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def attention(state: State, name: str, heads: int) -> dict[str, dict[str, np.ndarray]]:
    """Multi-head attention whose query, key and value stand in one matrix."""
    weights = np.split(state[f"{name}.in_proj_weight"], 3)
    biases = np.split(state[f"{name}.in_proj_bias"], 3)
    split = lambda x: x.reshape(*x.shape[:-1], heads, -1)  # noqa: E731
    out = dense(state, f"{name}.out_proj")
    parts = {
        part: {"kernel": split(weight.T), "bias": split(bias)}
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    }
    return parts | {"out": {"kernel": out["kernel"].reshape(heads, -1, out["kernel"].shape[-1]), "bias": out["bias"]}}


def lstm(state: State, name: str, suffix: str = "") -> dict:
    """An LSTM (one layer) or an LSTM cell as a `Recurrence`: its two biases become one."""
    inputs, recurrent = (state[f"{name}.weight_{k}{suffix}"] for k in ("ih", "hh"))
    bias = state[f"{name}.bias_ih{suffix}"] + state[f"{name}.bias_hh{suffix}"]
    return {
        "input": {"kernel": inputs.T.reshape(inputs.shape[1], 4, -1), "bias": bias.reshape(4, -1)},
        "kernel": recurrent.T,
    }


def folded(layer: Mapping[str, np.ndarray], state: State, norm: str, before: bool) -> dict[str, np.ndarray]:
    """A dense layer with the batch norm that stands `before` or after it, in its evaluation form, folded into it."""
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
    shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    kernel, bias = layer["kernel"], layer["bias"]
    if before:
        return {"kernel": kernel * scale[:, None], "bias": bias + shift @ kernel}
    return {"kernel": kernel * scale, "bias": bias * scale + shift}
