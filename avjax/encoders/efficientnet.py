"""EfficientNet (Tan & Le 2019): image → a vector for each cell of its last feature map, 1/32 of the image's size.

Batch norms are those of inference; `convert` folds them into the preceding convolutions. Checkpoints come in three
layouts: transformers' EfficientNetModel, timm's tf_efficientnet, and timm's exported by torch.onnx with folded norms.
HSEmotion publishes its face expression network (enet_b2: Savchenko 2022) in the last. Its Conv nodes are assumed to be
in the order of the module, which ONNX guarantees for a chain, and its convolutions without a norm, those of squeeze and
excitation, to keep timm's names.
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

# Padding of an image: TensorFlow's rule for any size, or pixels (before, after) of rows and of columns.
Padding = str | tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Block:
    """One inverted bottleneck; widths are numbers of units.

    Attributes:
      index: number of the stage, and of the block within it.
      inner: width between expansion and projection.
      expands: whether there is an expansion; otherwise `inner` is the input width.
      squeezed: bottleneck width of squeeze and excitation.
      residual: whether the input is added to the output.
    """

    index: tuple[int, int]
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
    """Architecture of a checkpoint; widths are numbers of units, sizes of images are in pixels."""

    image_size: tuple[int, int]  # height and width in training; others are accepted as well
    stem: int
    stem_padding: Padding
    blocks: tuple[Block, ...]
    width: int
    activation: str
    eps: float  # of batch normalisation

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "EfficientNetConfig":
        """Reads the contents of the hub's config.json.

        Stages and activation may be omitted if they are the paper's. A key that transformers does not have,
        `"padding": "same"`, asks for TensorFlow's padding at any size, as in timm's tf_efficientnet; without it,
        `depthwise_padding` is taken literally, as in transformers.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        base.read(config, {key: key for key in _REQUIRED})
        filled = _DEFAULTS | dict(config)
        _check(filled)
        side = filled["image_size"]
        return cls(
            image_size=(side, side) if isinstance(side, int) else tuple(side),
            stem=_scaled(32, filled),
            stem_padding=_padding(filled, kernel=3, adjusted=True),
            blocks=_blocks(filled),
            width=_scaled(1280, filled),
            activation=filled["hidden_act"],
            eps=filled["batch_norm_eps"],
        )

    @property
    def layers(self) -> int:
        """Returns 0: widths and sizes differ between blocks, so only the last features are available."""
        return 0

    def steps(self, length: int) -> int:
        """Returns the number of features of an image of the configured size; `length` is ignored."""
        return math.prod(self.grid(*self.image_size))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of the features of an image; 0 if it is too small."""
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
    """Scales a width of B0 to a multiple of the divisor at most a tenth below the exact width.

    This is Tan & Le's round_filters.
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
                    index=(stage, number),
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
    """Returns the padding; `adjusted`: one pixel less before than after, as TensorFlow pads even sizes at stride 2."""
    if config["padding"] == "same":
        return "SAME"
    pixels = (kernel // 2 - adjusted, kernel // 2)
    return pixels, pixels


def _pixels(padding: Padding, sides: Sequence[int], kernel: int, stride: int) -> Sequence[tuple[int, int]]:
    """Returns the pixels of a padding for an image of `sides` (rows, columns)."""
    return jax.lax.padtype_to_pads(sides, (kernel, kernel), (stride, stride), padding) if padding == "SAME" else padding


class EfficientNet(nn.Module):
    """The network up to its last feature map. Params are float32; `dtype` is the dtype of convolutions and products."""

    config: EfficientNetConfig
    dtype: jnp.dtype = jnp.float32
    layer: None = None

    @nn.compact
    def __call__(self, pixels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised images (b, h, w, 3) of any size to features (b, cells, d) in `dtype`, and their mask.

        Args:
          pixels: the images.
          mask: (b,) bool, True for real images.

        Returns:
          features, row by row of the feature map; mask (b, cells), the same for all features of an image.

        Raises:
          AvjaxError: the images do not have three channels, or are too small for a single feature.
        """
        c = self.config
        grid = c.grid(*pixels.shape[1:3])
        if 0 in grid or pixels.shape[3] != 3:
            raise AvjaxError(f"images {pixels.shape[1:]}: expected (height, width, 3) of some dozens of pixels")
        activation = base.activation(c.activation)
        x = jnp.where(mask[:, None, None, None], pixels, 0).astype(self.dtype)
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
    """Computes a depthwise convolution of x (b, h, w, d) with kernel (k, k, 1, d).

    On a CPU it is a sum of shifted inputs, ten to thirty times faster than XLA's grouped convolutions.
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
    """Builds the module from the contents of a hub config.json.

    Raises:
      AvjaxError: the configuration is not supported, or a layer is asked for.
    """
    if layer is not None:
        raise AvjaxError(f"layer is {layer}, but an efficientnet gives its last features only; expected layer=None")
    return EfficientNet(EfficientNetConfig.from_hub(config), dtype)


def shapes(config: EfficientNetConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `EfficientNet(config)` without computing them."""
    return base.shapes(EfficientNet(config), ((1, *config.image_size, 3), jnp.float32), ((1,), jnp.bool_))


# Our convolution, and the batch norm after it, → theirs; in order of computation.
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
_TIMM_BLOCK = {  # whether the block expands → its names
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
    """Converts a checkpoint of transformers, with or without its prefix, or of timm to the params of an EfficientNet.

    The batch norms of timm may be folded, as in the tensors that `formats.read` returns for an ONNX file.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
    """
    plain = {name.removeprefix("efficientnet."): _as_matrix(tensor) for name, tensor in tensors.items()}
    if "folded.0.weight" in plain:
        return weights.convert(plain, shapes(config), _onnx_names(config).__getitem__, IGNORED)
    names = _timm_names(config) if "conv_stem.weight" in plain else _hub_names(config)
    params = weights.convert(plain, _unfolded(shapes(config), names), functools.partial(_torch_name, names), IGNORED)
    return _folded(params, config.eps)


def _as_matrix(tensor: np.ndarray) -> np.ndarray:
    """Returns the kernel of a 1 x 1 convolution as a matrix; returns other tensors unchanged."""
    return tensor[..., 0, 0] if tensor.shape[2:] == (1, 1) else tensor


def _hub_names(config: EfficientNetConfig) -> dict[str, str]:
    blocks = range(len(config.blocks))
    inside = {f"block_{i}/{our}": f"encoder.blocks.{i}.{their}" for i in blocks for our, their in _HUB_BLOCK.items()}
    return _HUB_STEM | inside | _HUB_TOP


def _timm_names(config: EfficientNetConfig) -> dict[str, str]:
    inside = {
        f"block_{i}/{our}": f"blocks.{b.index[0]}.{b.index[1]}.{their}"
        for i, b in enumerate(config.blocks)
        for our, their in _TIMM_BLOCK[b.expands].items()
    }
    return _TIMM_STEM | inside | _TIMM_TOP


def _onnx_names(config: EfficientNetConfig) -> dict[str, str]:
    """Returns timm's names, except for convolutions with a norm, which `formats` numbers."""
    names = _timm_names(config)
    normed = [path for path in names if f"{path}/norm" in names]
    return names | {path: f"folded.{i}" for i, path in enumerate(normed)}


def _torch_name(names: Mapping[str, str], path: str) -> str:
    module, _, statistic = path.rpartition("/")
    return f"{names[module]}.running_{statistic}" if statistic in ("mean", "var") else names[path]


def _unfolded(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the shapes of params before folding: each folded bias becomes the params of its norm."""
    split = {}
    for path, shape in traverse_util.flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        if leaf == "bias" and f"{module}/norm" in names:
            split |= {f"{module}/norm/{part}": shape for part in ("scale", "bias", "mean", "var")}
        else:
            split[path] = shape
    return traverse_util.unflatten_dict(split, sep="/")


def _folded(params: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Folds norms into affine maps: y = (W x - mean) · scale / √(var + eps) + bias."""
    if "norm" not in params:
        return {name: _folded(part, eps) if isinstance(part, dict) else part for name, part in params.items()}
    norm = params["norm"]
    factor = norm["scale"] / np.sqrt(norm["var"] + eps)
    return {"kernel": params["kernel"] * factor, "bias": norm["bias"] - norm["mean"] * factor}


def prepare(raw: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Prepares RGB frames, as for `images.prepare`: returns inputs (n, h, w, 3) and mask (n,), all True."""
    pixels = images.prepare(raw, settings, "EfficientNetImageProcessor")
    return pixels, np.ones(len(pixels), bool)
