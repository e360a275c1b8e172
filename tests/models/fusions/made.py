"""What tests of several fusions share: clips, random parameters, and layers by plain NumPy."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

WIDTHS = {"text": 4, "audio": 3, "video": 5}


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Makes three clips of streams of `WIDTHS`; the second lacks audio, the third all streams."""
    rng, out = np.random.default_rng(0), {}
    for i, (s, width) in enumerate(WIDTHS.items()):
        out[s] = rng.normal(size=(3, 4 + i, width)).astype(np.float32)
        out[f"{s}_mask"] = np.arange(4 + i)[None] < np.array([[3 + i], [0 if s == "audio" else 2], [0]])
    return out


def drawn(module: nn.Module, *args: Any) -> dict[str, Any]:
    """Draws variables that are all random, biases and scales too; matrices and kernels by their fan-in."""
    rng = np.random.default_rng(5)
    fan_in = lambda v: np.prod(v.shape[:-1]) if len(v.shape) > 1 else 4  # noqa: E731
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape) / np.sqrt(fan_in(v))), shapes)


def randomised(module: nn.Module, *args: Any) -> dict[str, Any]:
    """Draws variables that are all of standard normal distribution, biases and scales too."""
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)


def dense(x: np.ndarray, layer: Mapping[str, Any]) -> np.ndarray:
    """Maps x (..., i) by a layer's kernel (i, o) and, where it has one, its bias."""
    return np.float64(x) @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Computes the softmax of scores (n,)."""
    probabilities = np.exp(scores - np.max(scores))
    return probabilities / probabilities.sum()
