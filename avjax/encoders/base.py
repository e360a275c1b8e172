"""Code common to all families of encoders: descriptions of inputs, configurations, padding, layers and activations."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from avjax.errors import AvjaxError

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a family.

    Attributes:
      what: description for error messages, such as "waveforms (batch, samples)".
      rank: number of axes.
      length_axis: the axis that may be padded; None if all inputs have the same size. The mask covers the batch axis
        and, if there is one, the length axis.
      prefix: whether padding may only follow real steps, as in audio.
      least: the smallest length bucket.
      text: whether the inputs are token ids.
    """

    what: str
    rank: int
    length_axis: int | None
    prefix: bool = False
    least: int = 1
    text: bool = False

    def masked(self, inputs: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Returns the mask of `inputs` as bool; all True if none is given.

        Raises:
          AvjaxError: inputs or mask have the wrong shape for this family, or the mask has gaps.
        """
        if inputs.ndim != self.rank:
            raise AvjaxError(f"inputs {inputs.shape}: expected {self.what}")
        axes = (0,) if self.length_axis is None else (0, self.length_axis)
        shape = tuple(inputs.shape[a] for a in axes)
        mask = np.ones(shape, bool) if mask is None else np.asarray(mask, bool)
        if mask.shape != shape:
            raise AvjaxError(f"inputs {inputs.shape} and mask {mask.shape}: expected a mask {shape} for {self.what}")
        if self.prefix and (mask[:, 1:] > mask[:, :-1]).any():
            raise AvjaxError(f"the mask of {self.what} has gaps; padding may only follow real steps")
        return mask


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of an encoder's folder.

    `config` and `settings` are the contents of config.json and preprocessor_config.json, `tensors` is the weights file;
    a tokenizer.json may lie beside it.
    """

    config: Mapping[str, Any]
    tensors: Path
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ImageConfig:
    """Base of the configurations of image encoders: no axis is padded, so there is no longest input."""

    longest = None


class TextConfig:
    """Base of the configurations of text encoders: one feature for each word piece."""

    positions: int

    @property
    def longest(self) -> int:
        """Returns the longest input, in word pieces."""
        return self.positions

    def steps(self, length: int) -> int:
        """Returns the number of features of an input of `length`."""
        return length


def shapes(module: nn.Module, *inputs: tuple[tuple[int, ...], Any]) -> dict[str, Any]:
    """Returns the shapes of the params of a module without computing them; `inputs` are (shape, dtype) pairs."""
    return jax.eval_shape(module.init, jax.random.key(0), *(jax.ShapeDtypeStruct(*x) for x in inputs))["params"]


def torch_name(path: str, top: Mapping[str, str], layers: str, block: Mapping[str, str]) -> str:
    """Returns the PyTorch name of the Flax module `path`: its entry in `top` or, in block i of `layers`, in `block`."""
    name, _, rest = path.partition("/")
    return f"{layers}.{name.removeprefix('block_')}.{block[rest]}" if rest else top[path]


def pad_rows(rows: Sequence[np.ndarray], fill: Any, shape: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Stacks rows (*shape, length) of different lengths.

    Args:
      rows: b arrays or lists.
      fill: the padding value; its dtype becomes that of the batch.
      shape: sizes of the axes before the length axis.

    Returns:
      The batch (b, *shape, l) and its mask (b, l), where l is the longest length.
    """
    lengths = np.array([np.shape(row)[-1] for row in rows], int)
    mask = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
    batch = np.full((len(rows), *shape, mask.shape[1]), fill)
    for out, row in zip(batch, rows, strict=True):
        out[..., : np.shape(row)[-1]] = row
    return batch, mask


def block_count(layer: int | None, layers: int) -> int:
    """Returns how many of the `layers` blocks to compute for `layer`; None: all.

    Raises:
      AvjaxError: there is no such layer.
    """
    if layer is None:
        return layers
    if not 0 <= layer <= layers:
        raise AvjaxError(f"layer is {layer}, expected 0 (before the first block) to {layers}")
    return layer


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the activation function that the hub's config.json names.

    Raises:
      AvjaxError: the name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise AvjaxError(f"activation {name!r} is not known; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Reads the fields of an architecture, field → value, from a hub config.json; `keys` maps field → key in it.

    Raises:
      AvjaxError: keys are missing.
    """
    missing = [key for key in keys.values() if key not in config]
    if missing:
        raise AvjaxError(f"config.json of a {config['model_type']} lacks {', '.join(missing)}")
    return {field: config[key] for field, key in keys.items()}
