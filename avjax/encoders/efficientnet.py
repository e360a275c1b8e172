"""EfficientNet (Tan & Le 2019): picture → a vector for each place of its last feature map, 1/32 of the picture's size.

Batch norms are those of inference; `convert` folds them into the convolutions before them. Checkpoints come in three
layouts: transformers' EfficientNetModel, timm's tf_efficientnet, and timm's as torch.onnx exports it, with the norms
folded already. The last is how HSEmotion gives its face expression network (enet_b2: Savchenko 2022); of such a file it
is assumed that its Conv nodes stand in the order of the module, which ONNX guarantees for a chain, and that the
convolutions without a norm, those of squeeze and excitation, keep timm's names.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from avjax.encoders import base, images, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError
from avjax.layers import Project

INPUTS = Inputs("images (batch, height, width, 3)", rank=4, length_axis=None)

# What stands around a picture: TensorFlow's rule for whatever size, or pixels (before, after) of rows and of columns.
Padding = str | tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Block:
    """One inverted bottleneck; widths in numbers of units.

    Attributes:
      place: number of the stage, and of the block within it.
      inner: width between expansion and projection.
      expands: whether there is an expansion; else `inner` is the width that comes in.
      squeezed: width of the bottleneck of squeeze and excitation.
      residual: whether what comes in is added to what comes out.
    """

    place: tuple[int, int]
    inner: int
    expands: bool
    kernel: int
    stride: int
    padding: Padding
    squeezed: int
    width: int
    residual: bool


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig(base.ImageConfig):
    """Architecture of a checkpoint; widths in numbers of units, pictures in pixels."""

    picture: tuple[int, int]  # height and width that it was trained with; others are computed as well
    stem: int
    stem_padding: Padding
    blocks: tuple[Block, ...]
    width: int
    activation: str
    eps: float  # of batch normalisation

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "EfficientNetConfig":
        """Reads the contents of the hub's config.json.

        Stages and activation may be left out where they are the paper's. A key that transformers does not have,
        `"padding": "same"`, asks for TensorFlow's padding at whatever size, which timm's tf_efficientnet computes;
        without it, `depthwise_padding` is taken literally, as transformers does.

        Raises:
          AvjaxError: a value is missing, or asks for a variant that this module does not compute.
        """
        base.read(config, {key: key for key in _REQUIRED})
        filled = _DEFAULTS | dict(config)
        _check(filled)
        side = filled["image_size"]
        return cls(
            picture=(side, side) if isinstance(side, int) else tuple(side),
            stem=_scaled(32, filled),
            stem_padding=_padding(filled, kernel=3, adjusted=True),
            blocks=_blocks(filled),
            width=_scaled(1280, filled),
            activation=filled["hidden_act"],
            eps=filled["batch_norm_eps"],
        )

    @property
    def layers(self) -> int:
        """0: widths and sizes differ from block to block, so that only the last features are given."""
        return 0

    def steps(self, length: int) -> int:
        """How many features a picture of the configured size has; `length` does not count."""
        return math.prod(self.grid(*self.picture))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the features of a picture; 0 where it is too small."""
        windows = [(3, 2, self.stem_padding), *((b.kernel, b.stride, b.padding) for b in self.blocks)]
        sides = height, width
        for kernel, stride, padding in windows:
            pads = _pixels(padding, sides, kernel, stride)
            sides = tuple(max(0, (n + sum(p) - kernel) // stride + 1) for n, p in zip(sides, pads, strict=True))
        return sides


_REQUIRED = ("width_coefficient", "depth_coefficient", "hidden_dim", "image_size")
_STAGES = ("in_channels", "out_channels", "kernel_sizes", "strides", "expand_ratios", "num_block_repeats")
_DEFAULTS = {
    "num_channels": 3,
    "depth_divisor": 8,
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "num_block_repeats": (1, 2, 2, 3, 3, 4, 1),
    "expand_ratios": (1, 6, 6, 6, 6, 6, 6),
    "depthwise_padding": (),
    "squeeze_expansion_ratio": 0.25,
    "hidden_act": "swish",
    "batch_norm_eps": 1e-3,
    "padding": "literal",
}


def _check(config: Mapping[str, Any]) -> None:
    base.activation(config["hidden_act"])
    for key, expected, fits in (
        ("num_channels", "3: images are RGB", config["num_channels"] == 3),
        ("padding", "'same', or none", config["padding"] in ("same", "literal")),
        ("hidden_dim", f"the top's {_scaled(1280, config)}", config["hidden_dim"] == _scaled(1280, config)),
        ("strides", "1 or 2 for each stage", set(config["strides"]) <= {1, 2}),
        ("kernel_sizes", "odd numbers from 3", all(k % 2 and k > 1 for k in config["kernel_sizes"])),
    ):
        if not fits:
            raise AvjaxError(f"{key} is {config[key]!r} in config.json of an efficientnet, expected {expected}")
    counts = {key: len(config[key]) for key in _STAGES}
    if len(set(counts.values())) > 1:
        raise AvjaxError(f"numbers of stages differ in config.json of an efficientnet: {counts}")


def _scaled(width: int, config: Mapping[str, Any]) -> int:
    """A width of B0 at this size: a multiple of the divisor, no more than a tenth below the exact one (Tan & Le's
    round_filters).
    """
    divisor, exact = config["depth_divisor"], width * config["width_coefficient"]
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded


def _blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for stage, values in enumerate(zip(*(config[key] for key in _STAGES), strict=True)):
        incoming, width = (_scaled(n, config) for n in values[:2])
        kernel, stride, expansion, repeats = values[2:]
        for number in range(math.ceil(config["depth_coefficient"] * repeats)):
            first = number == 0
            narrow = incoming if first else width
            blocks.append(
                Block(
                    place=(stage, number),
                    inner=narrow * expansion,
                    expands=expansion != 1,
                    kernel=kernel,
                    stride=stride if first else 1,
                    padding=_padding(
                        config, kernel, first and stride == 2 and len(blocks) not in config["depthwise_padding"]
                    ),
                    squeezed=max(1, int(narrow * config["squeeze_expansion_ratio"])),
                    width=width,
                    residual=not first,
                )
            )
    return tuple(blocks)


def _padding(config: Mapping[str, Any], kernel: int, adjusted: bool) -> Padding:
    """`adjusted`: one pixel less before than after, TensorFlow's padding of an even size at stride 2."""
    if config["padding"] == "same":
        return "SAME"
    pixels = (kernel // 2 - adjusted, kernel // 2)
    return pixels, pixels


def _pixels(padding: Padding, sides: Sequence[int], kernel: int, stride: int) -> Sequence[tuple[int, int]]:
    """The pixels of a padding for a picture of `sides` (rows, columns)."""
    return jax.lax.padtype_to_pads(sides, (kernel, kernel), (stride, stride), padding) if padding == "SAME" else padding


class EfficientNet(nn.Module):
    """The network up to its last feature map. Params are float32; `dtype` is that of convolutions and products."""

    config: EfficientNetConfig
    dtype: jnp.dtype = jnp.float32
    layer: None = None

    @nn.compact
    def __call__(self, pictures: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised pictures (b, h, w, 3) of any size to features (b, places, d) in `dtype`, and their mask.

        Args:
          mask: (b,) bool, which pictures are real.

        Returns:
          features, row by row of the feature map; mask (b, places), each picture's own.

        Raises:
          AvjaxError: the pictures have no three channels, or are too small for a single place.
        """
        c = self.config
        grid = c.grid(*pictures.shape[1:3])
        if 0 in grid or pictures.shape[3] != 3:
            raise AvjaxError(f"images {pictures.shape[1:]}: expected (height, width, 3) of some dozens of pixels")
        activation = base.activation(c.activation)
        x = jnp.where(mask[:, None, None, None], pictures, 0).astype(self.dtype)
        x = activation(nn.Conv(c.stem, (3, 3), (2, 2), c.stem_padding, dtype=self.dtype, name="stem")(x))
        for i, block in enumerate(c.blocks):
            x = _Bottleneck(block, activation, self.dtype, name=f"block_{i}")(x)
        x = activation(Project((c.width,), dtype=self.dtype, name="top")(x))
        x = x.reshape(len(x), math.prod(grid), c.width)
        return x, jnp.broadcast_to(mask[:, None], x.shape[:2])


class _Bottleneck(nn.Module):
    """Inverted bottleneck with squeeze and excitation (MobileNetV3): x (b, h, w, d) → (b, h', w', d')."""

    block: Block
    activation: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b = self.block
        project = functools.partial(Project, dtype=self.dtype)
        inner = self.activation(project((b.inner,), name="expand")(x)) if b.expands else x
        inner = self.activation(self._depthwise()(inner))
        gates = self.activation(project((b.squeezed,), name="squeeze")(inner.mean((1, 2))))
        gates = nn.sigmoid(project((b.inner,), name="excite")(gates))  # b inner
        out = project((b.width,), name="project")(inner * gates[:, None, None])
        return x + out if b.residual else out

    def _depthwise(self) -> nn.Conv:
        b = self.block
        return nn.Conv(
            b.inner,
            (b.kernel, b.kernel),
            (b.stride, b.stride),
            b.padding,
            feature_group_count=b.inner,
            dtype=self.dtype,
            conv_general_dilated=_convolved,
            name="depthwise",
        )


def _convolved(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding, **layout: Any) -> jax.Array:
    """A depthwise convolution of x (b, h, w, d) with kernel (k, k, 1, d).

    On a CPU a sum of shifted pictures, ten to thirty times faster than what XLA makes of grouped convolutions there.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted(x, kernel, strides[0], padding),
        default=lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, strides, padding, **layout),
    )


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    size = len(kernel)
    wide = jnp.pad(x, ((0, 0), *_pixels(padding, x.shape[1:3], size, stride), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in wide.shape[1:3])
    taps = (
        wide[:, i::stride, j::stride][:, :rows, :columns].astype(jnp.float32) * kernel[i, j][None, None]
        for i in range(size)
        for j in range(size)
    )
    return functools.reduce(jnp.add, taps).astype(x.dtype)


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> EfficientNet:
    """The module for the contents of a hub's config.json.

    Raises:
      AvjaxError: the configuration is not computed, or a layer is asked for.
    """
    if layer is not None:
        raise AvjaxError(f"layer is {layer}, but an efficientnet gives its last features only; expected layer=None")
    return EfficientNet(EfficientNetConfig.from_hub(config), dtype)


def shapes(config: EfficientNetConfig) -> dict[str, Any]:
    """The params of `EfficientNet(config)` as shapes, without computing them."""
    return base.shapes(EfficientNet(config), ((1, *config.picture, 3), jnp.float32), ((1,), jnp.bool_))


# Our convolution, and the batch norm after it, → theirs; in the order in which they are computed.
_HUB_STEM = {"stem": "embeddings.convolution", "stem/norm": "embeddings.batchnorm"}
_HUB_TOP = {"top": "encoder.top_conv", "top/norm": "encoder.top_bn"}
_HUB_BLOCK = {
    "expand": "expansion.expand_conv",
    "expand/norm": "expansion.expand_bn",
    "depthwise": "depthwise_conv.depthwise_conv",
    "depthwise/norm": "depthwise_conv.depthwise_norm",
    "squeeze": "squeeze_excite.reduce",
    "excite": "squeeze_excite.expand",
    "project": "projection.project_conv",
    "project/norm": "projection.project_bn",
}
_TIMM_STEM = {"stem": "conv_stem", "stem/norm": "bn1"}
_TIMM_TOP = {"top": "conv_head", "top/norm": "bn2"}
_TIMM_GATES = {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"}
_TIMM_BLOCK = {  # whether it expands → its names
    True: {
        "expand": "conv_pw",
        "expand/norm": "bn1",
        "depthwise": "conv_dw",
        "depthwise/norm": "bn2",
        **_TIMM_GATES,
        "project": "conv_pwl",
        "project/norm": "bn3",
    },
    False: {
        "depthwise": "conv_dw",
        "depthwise/norm": "bn1",
        **_TIMM_GATES,
        "project": "conv_pw",
        "project/norm": "bn2",
    },
}
# The classifier, counters of training steps, and constants of an ONNX graph (the pixels of its paddings).
IGNORED = re.compile(r"^classifier\.|\.num_batches_tracked$|^(onnx::\w+_)?\d+$")


def convert(tensors: Mapping[str, np.ndarray], config: EfficientNetConfig) -> dict[str, Any]:
    """Params of `EfficientNet(config)` out of the tensors of a checkpoint: transformers', with or without its prefix,
    or timm's, with batch norms or, as `formats.read` gives those of an ONNX file, folded.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of another shape; the message names them.
    """
    plain = {name.removeprefix("efficientnet."): _as_matrix(tensor) for name, tensor in tensors.items()}
    if "folded.0.weight" in plain:
        return weights.convert(plain, shapes(config), _onnx_names(config).__getitem__, IGNORED)
    names = _timm_names(config) if "conv_stem.weight" in plain else _hub_names(config)
    found = weights.convert(plain, _unfolded(shapes(config), names), functools.partial(_torch_name, names), IGNORED)
    return _folded(found, config.eps)


def _as_matrix(tensor: np.ndarray) -> np.ndarray:
    """The kernel of a convolution of single pixels as what it is; others as they are."""
    return tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor


def _hub_names(config: EfficientNetConfig) -> dict[str, str]:
    blocks = range(len(config.blocks))
    inside = {f"block_{i}/{our}": f"encoder.blocks.{i}.{their}" for i in blocks for our, their in _HUB_BLOCK.items()}
    return _HUB_STEM | inside | _HUB_TOP


def _timm_names(config: EfficientNetConfig) -> dict[str, str]:
    inside = {
        f"block_{i}/{our}": f"blocks.{b.place[0]}.{b.place[1]}.{their}"
        for i, b in enumerate(config.blocks)
        for our, their in _TIMM_BLOCK[b.expands].items()
    }
    return _TIMM_STEM | inside | _TIMM_TOP


def _onnx_names(config: EfficientNetConfig) -> dict[str, str]:
    """Timm's names, but for convolutions with a norm the number by which `formats` calls them."""
    names = _timm_names(config)
    normed = [path for path in names if f"{path}/norm" in names]
    return names | {path: f"folded.{i}" for i, path in enumerate(normed)}


def _torch_name(names: Mapping[str, str], path: str) -> str:
    module, _, statistic = path.rpartition("/")
    return f"{names[module]}.running_{statistic}" if statistic in ("mean", "var") else names[path]


def _unfolded(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Shapes of params before folding: each bias that came of a norm gives its shape to that."""
    split = {}
    for path, shape in traverse_util.flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        if leaf == "bias" and f"{module}/norm" in names:
            split |= {f"{module}/norm/{part}": shape for part in ("scale", "bias", "mean", "var")}
        else:
            split[path] = shape
    return traverse_util.unflatten_dict(split, sep="/")


def _folded(params: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Params without norms: y = (W x - mean) · scale / √(var + eps) + bias is an affine map of x."""
    if "norm" not in params:
        return {name: _folded(part, eps) if isinstance(part, dict) else part for name, part in params.items()}
    norm = params["norm"]
    factor = norm["scale"] / np.sqrt(norm["var"] + eps)
    return {"kernel": params["kernel"] * factor, "bias": norm["bias"] - norm["mean"] * factor}


def prepare(raw: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """RGB frames as `images.prepare` takes them → inputs (n, h, w, 3) and mask (n,), all True."""
    pictures = images.prepare(raw, settings, "EfficientNetImageProcessor")
    return pictures, np.ones(len(pictures), bool)
