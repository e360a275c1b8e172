"""Vision transformers: ViT (Dosovitskiy et al. 2021) and DINOv2 (Oquab et al. 2024): image → a vector a patch.

The class token comes first. DINOv2 adds layer scale; its positions are interpolated for images of other sizes than in
training.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.encoders import base, images, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError
from avjax.layers import PreNormBlock, Project

INPUTS = Inputs("images (batch, height, width, 3)", rank=4, length_axis=None)


@dataclasses.dataclass(frozen=True)
class ViTConfig(base.ImageConfig):
    """Architecture of a checkpoint; widths are numbers of units, images and patches are in pixels."""

    model_type: str  # "vit" or "dinov2"
    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    image_size: tuple[int, int]  # height and width that the positions are for
    patch: tuple[int, int]
    activation: str
    eps: float  # of layer normalisation
    biased: bool  # whether query, key and value have biases

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Reads the contents of the hub's config.json.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        kind = config["model_type"]
        fields = base.read(_DEFAULTS[kind] | dict(config), _KEYS | _INNER[kind])
        if kind == "dinov2":
            fields["inner"] = int(fields["width"] * fields["inner"])
        fields |= {"image_size": _pair(fields["image_size"]), "patch": _pair(fields["patch"])}
        _check(config, fields)
        return cls(**fields)

    @property
    def grid(self) -> tuple[int, int]:
        """Returns the rows and columns of patches that the positions are for."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    def steps(self, length: int) -> int:
        """Returns the number of features of an image, class token included; `length` is ignored."""
        return 1 + self.grid[0] * self.grid[1]


_KEYS = {
    "model_type": "model_type",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "image_size": "image_size",
    "patch": "patch_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
    "biased": "qkv_bias",
}
_INNER = {"vit": {"inner": "intermediate_size"}, "dinov2": {"inner": "mlp_ratio"}}
_DEFAULTS = {
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True},
    "dinov2": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True},
}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _check(config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    base.activation(fields["activation"])
    if config.get("use_swiglu_ffn") or config.get("num_register_tokens"):
        raise AvjaxError("DINOv2 with a SwiGLU feed-forward layer or register tokens is not supported; see config.json")
    if config.get("num_channels", 3) != 3:
        raise AvjaxError(f"num_channels is {config['num_channels']} in config.json, expected 3: images are RGB")
    size, patch = fields["image_size"], fields["patch"]
    if size[0] % patch[0] or size[1] % patch[1]:
        raise AvjaxError(f"image_size {size} in config.json: expected multiples of patch_size {patch}")
    if fields["model_type"] == "dinov2" and (size[0] != size[1] or patch[0] != patch[1]):
        raise AvjaxError(f"image_size {size} and patch_size {patch} in config.json: expected squares of a dinov2")


class ViT(nn.Module):
    """The encoder without pooler and heads. Params are float32; `dtype` is the dtype of matrix products.

    `layer` is the number of blocks to compute; None: all, and the last normalisation. With `remat`, gradients recompute
    activations within blocks to save memory.
    """

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised images (b, h, w, 3) to hidden states (b, 1 + patches, d) in `dtype`, and their mask.

        Args:
          pixels: images of the configured size; for DINOv2, of any sides that are multiples of the patch size.
          mask: (b,) bool, True for real images.

        Returns:
          features, the class token first, then the patches row by row; mask (b, 1 + patches), the same for all features
          of an image.

        Raises:
          AvjaxError: the images have a wrong size.
        """
        c = self.config
        grid = _grid(c, pixels.shape[1:])
        pixels = jnp.where(mask[:, None, None, None], pixels, 0)
        tiles = images.unfold(pixels, grid)
        patches = Project((c.width,), inputs=3, dtype=self.dtype, name="patches")(tiles)  # b n d
        token = self.param("class_token", nn.initializers.zeros, (1, 1, c.width))
        positions = self.param("positions", nn.initializers.normal(0.02), (1, c.steps(0), c.width))
        token = jnp.broadcast_to(token.astype(self.dtype), (len(patches), 1, c.width))
        x = jnp.concatenate([token, patches], 1) + _positions(positions, c.grid, grid).astype(self.dtype)
        mask = jnp.broadcast_to(mask[:, None], x.shape[:2])
        for i in range(layers := base.block_count(self.layer, c.layers)):
            x = self._block(i)(x, mask)
        if layers == c.layers:
            x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="norm")(x)
        return x, mask

    def _block(self, i: int) -> PreNormBlock:
        c = self.config
        unbiased = () if c.biased else ("query", "key", "value")
        scaled = c.model_type == "dinov2"
        activation = base.activation(c.activation)
        block = nn.remat(PreNormBlock) if self.remat else PreNormBlock
        return block(c.heads, c.inner, activation, c.eps, self.dtype, unbiased, scaled, name=f"block_{i}")


def _grid(config: ViTConfig, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of patches of images of `shape` (height, width, 3)."""
    (height, width), (patch_height, patch_width) = config.image_size, config.patch
    if config.model_type == "dinov2":
        fits = not (shape[0] % patch_height or shape[1] % patch_width)
        expected = f"sides that are multiples of {patch_height}"
    else:
        fits, expected = shape[:2] == config.image_size, f"{height} x {width}"
    if not fits or shape[2] != 3 or 0 in shape:
        raise AvjaxError(f"images {shape}: expected {expected} and 3 channels; `prepare` resizes")
    return shape[0] // patch_height, shape[1] // patch_width


def _positions(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Interpolates positions (1, 1 + patches, d) from the `old` grid of patches to `new`; keeps the class token's."""
    if old == new:
        return positions
    patches = positions[0, 1:].reshape(*old, -1)
    rows, columns = (_bicubic(*sides) for sides in zip(old, new, strict=True))
    patches = jnp.einsum("yh,xw,hwd->yxd", rows, columns, patches, precision="highest")  # float32 in the original
    return jnp.concatenate([positions[:, :1], patches.reshape(1, -1, positions.shape[-1])], 1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Returns the matrix (new, old) of cubic convolution (Keys 1981): a = -0.75, half-pixel centres, no antialias."""
    a = -0.75
    at = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(at[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), np.where(d <= 1, near, far))
    return matrix


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> ViT:
    """Builds the module from the contents of a hub config.json."""
    return ViT(ViTConfig.from_hub(config), dtype, layer)


def shapes(config: ViTConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `ViT(config)` without computing them."""
    return base.shapes(ViT(config), ((1, *config.image_size, 3), jnp.float32), ((1,), jnp.bool_))


_TOP = {
    "patches": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "norm": "layernorm",
}
_ATTENTION = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
}
_BLOCK = {
    "vit": _ATTENTION
    | {
        "attention_norm": "layernorm_before",
        "norm": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "dinov2": _ATTENTION
    | {
        "attention_norm": "norm1",
        "attention_scale": "layer_scale1.lambda1",
        "norm": "norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "feed_forward_scale": "layer_scale2.lambda1",
    },
}
_PREFIX = re.compile(r"^(vit|dinov2|backbone)\.")
# The pooler, heads of classification and of masked pretraining, the token of masked patches; and the decoder of the
# saliency network that contains a DINOv2 S/14.
IGNORED = re.compile(r"^(pooler|classifier)\.|^embeddings\.mask_token$|^decoder\.(0|upconv[123]|bn[123]|final_conv)\.")


def convert(tensors: Mapping[str, np.ndarray], config: ViTConfig) -> dict[str, Any]:
    """Converts a checkpoint, with or without its model's prefix, to the params of `ViT(config)`.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
    """
    plain = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    name_of = functools.partial(base.torch_name, top=_TOP, layers="encoder.layer", block=_BLOCK[config.model_type])
    return weights.convert(plain, shapes(config), name_of, IGNORED)


def prepare(raw: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Prepares RGB frames, as for `images.prepare`: returns inputs (n, h, w, 3) and mask (n,), all True."""
    pixels = images.prepare(raw, settings)
    return pixels, np.ones(len(pixels), bool)
