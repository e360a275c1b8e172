"""Which weights of a pretrained encoder are trained: the weights themselves, or low-rank updates of their kernels.

Trained params have the layout of the encoder's params without the frozen leaves. Under LoRA (Hu et al. 2022, "LoRA:
low-rank adaptation of large language models", section 4.1) a kernel is replaced by the two factors of its update. Paths
are names joined by "/", beginning with the stream: `video/block_0/attention/query/kernel`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from avjax.errors import AvjaxError
from avjax.settings import LoraSettings


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Which pretrained weights are trained: no leaf whose path matches a pattern in `frozen`.

    Of the others all are trained or, with `lora`, updates of its targets: a kernel W becomes
    W + (alpha / rank) · down · up, and W itself stays. `down` (inputs, rank) and `up` (rank, outputs) are the paper's A
    and B, transposed.
    """

    frozen: tuple[str, ...] = ()
    lora: LoraSettings | None = None

    def chosen(self, stream: str, paths: Iterable[str]) -> list[str]:
        """Returns the paths of a stream's encoder that are trained."""
        free = [path for path in paths if not _matches(self.frozen, f"{stream}/{path}")]
        return [path for path in free if _matches(self.lora.targets, f"{stream}/{path}")] if self.lora else free

    def check(self, pretrained: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises AvjaxError if a pattern matches no path of the params of any stream."""
        paths = [f"{stream}/{path}" for stream, params in pretrained.items() for path in flatten_dict(params, sep="/")]
        keys = {"frozen": self.frozen, "lora.targets": self.lora.targets if self.lora else ()}
        for key, pattern in ((key, pattern) for key, patterns in keys.items() for pattern in patterns):
            if not any(re.search(pattern, path) for path in paths):
                raise AvjaxError(
                    f"model.encoders.{key}: {pattern!r} is found in no path of the encoders; they look like {paths[0]}"
                )


def _matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def init_params(key: jax.Array, tuning: Tuning, stream: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the initial trained params of a stream's encoder, which leave the pretrained `params` unchanged.

    Raises:
      AvjaxError: a target of LoRA is not a kernel.
    """
    flat = flatten_dict(params, sep="/")
    chosen = tuning.chosen(stream, flat)
    if not tuning.lora:
        return unflatten_dict({path: flat[path] for path in chosen}, sep="/")
    keys = jax.random.split(key, max(1, len(chosen)))
    pairs = {
        path: _factors(k, f"{stream}/{path}", flat[path].shape, tuning.lora.rank)
        for k, path in zip(keys, chosen, strict=False)
    }
    return unflatten_dict(pairs, sep="/")


def _factors(key: jax.Array, path: str, shape: tuple[int, ...], rank: int) -> dict[str, jax.Array]:
    """Returns initial factors, Gaussian and zero as in the paper; the variance, not stated there, keeps the inputs'."""
    if len(shape) < 2:
        raise AvjaxError(
            f"model.encoders.lora.targets names {path} of shape {shape}, which is not a kernel: "
            "end the pattern in '/kernel$'"
        )
    inputs, outputs = _sides(shape)
    return {
        "down": jax.random.normal(key, (inputs, rank), jnp.float32) / math.sqrt(inputs),
        "up": jnp.zeros((rank, outputs), jnp.float32),
    }


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a kernel.

    Heads split one of its two axes, and the shape does not show which. The matrix of an attention projection is square,
    so the split nearest to a square is taken.
    """
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=lambda sides: max(sides) / min(sides))


def merged(tuning: Tuning, params: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the params of an encoder with the trained ones replacing, or added to, the pretrained ones."""
    flat, ours = flatten_dict(params, sep="/"), flatten_dict(trained, sep="/")
    if not tuning.lora:
        return unflatten_dict(flat | ours, sep="/")
    scale = tuning.lora.alpha / tuning.lora.rank
    for path in {path.rpartition("/")[0] for path in ours}:
        # Small against the kernel, so never in less than float32.
        change = jnp.matmul(ours[f"{path}/down"], ours[f"{path}/up"], precision="highest")
        flat[path] = flat[path] + scale * change.reshape(flat[path].shape)
    return unflatten_dict(flat, sep="/")
