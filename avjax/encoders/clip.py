"""CLIP (Radford et al. 2021): a vision tower and a text tower, whose embeddings lie in one joint space.

The vision tower is a ViT that normalises before its first block; the text tower is causal, so its end token has seen
the whole text.
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

from avjax.encoders import base, images, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError, choose
from avjax.layers import PreNormBlock, Project, causal


@dataclasses.dataclass(frozen=True)
class _TowerConfig:
    """Fields of both towers; widths are numbers of units."""

    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    activation: str
    eps: float  # of layer normalisation
    joint: int  # width of the joint space


@dataclasses.dataclass(frozen=True)
class VisionConfig(_TowerConfig, base.ImageConfig):
    """Architecture of a vision tower; images and patches are squares, sides in pixels."""

    image_size: int
    patch: int

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Reads the contents of the hub's config.json, or the result of `tower_config`.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        fields = _read(config, {"image_size": "image_size", "patch": "patch_size"})
        if config.get("num_channels", 3) != 3:
            raise AvjaxError(f"num_channels is {config['num_channels']} in config.json, expected 3: images are RGB")
        sides = fields["image_size"], fields["patch"]
        if not all(isinstance(side, int) for side in sides) or sides[0] % sides[1]:
            raise AvjaxError(
                f"image_size {sides[0]} and patch_size {sides[1]} in config.json: expected one number each, the first "
                "a multiple of the second"
            )
        return cls(**fields)

    @property
    def grid(self) -> tuple[int, int]:
        """Returns the rows and columns of patches."""
        return (self.image_size // self.patch,) * 2

    def steps(self, length: int) -> int:
        """Returns the number of features of an image, class token included; `length` is ignored."""
        return 1 + math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class TextConfig(_TowerConfig, base.TextConfig):
    """Architecture of a text tower."""

    vocab: int
    positions: int  # the longest text, in word pieces
    end: int  # the id of the end token; always 2 in older files, even if that is wrong

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Reads the contents of the hub's config.json, or the result of `tower_config`.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        fields = _read(config, {"vocab": "vocab_size", "positions": "max_position_embeddings", "end": "eos_token_id"})
        if not isinstance(fields["end"], int):
            raise AvjaxError(f"eos_token_id is {fields['end']} in config.json, expected one id")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Architecture of both towers."""

    vision: VisionConfig
    text: TextConfig

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Reads the contents of the hub's config.json with `model_type` "clip"; errors as for the towers."""
        towers = {name: tower_config(config, name) for name in ("vision", "text")}
        return cls(VisionConfig.from_hub(towers["vision"]), TextConfig.from_hub(towers["text"]))


_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
    "joint": "projection_dim",
}
# Defaults of the original's configuration classes. Nested configurations of a ViT-B/32 omit even its sizes.
_ASSUMED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512, "eos_token_id": 49407}
_B32 = {
    "vision": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
    },
    "text": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}


def _read(config: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    fields = base.read(_ASSUMED | dict(config), _KEYS | own)
    base.activation(fields["activation"])
    return fields


def tower_config(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """Extracts the configuration of a single tower from the contents of a whole CLIP's config.json.

    Args:
      config: `model_type` is "clip"; the configurations of the towers are nested in it and omit values equal to those
        of ViT-B/32. In older files "vision_config_dict" and "text_config_dict" take precedence.
      tower: "vision" or "text".

    Returns:
      The complete configuration of the tower, of model_type "clip_vision_model" or "clip_text_model", with the
      `projection_dim` of the whole CLIP.

    Raises:
      AvjaxError: there is no such tower.
    """
    choose("tower", tower, _B32)
    defaults = _ASSUMED | _B32[tower]
    nested = defaults | (config.get(f"{tower}_config") or {})
    older = config.get(f"{tower}_config_dict")
    if older is not None:
        nested |= defaults | older
    own = {"model_type": f"clip_{tower}_model", "projection_dim": config.get("projection_dim", 512)}
    return nested | own


class Vision(nn.Module):
    """The vision tower. Params are float32; `dtype` is the dtype of matrix products.

    `layer` is the number of blocks to compute; None: all. If `projected`, returns the embedding in the joint space.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    projected: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised images (b, h, w, 3) to hidden states (b, 1 + patches, d) in `dtype`, and their mask.

        Args:
          pixels: images of the configured size.
          mask: (b,) bool, True for real images.

        Returns:
          features, the class token first, then the patches row by row; mask (b, 1 + patches), the same for all features
          of an image. If `projected`, the embeddings (b, 1, joint), not normalised, and mask (b, 1).

        Raises:
          AvjaxError: the images have a wrong size, or `projected` is combined with a `layer` below the last.
        """
        c = self.config
        if pixels.shape[1:] != (c.image_size, c.image_size, 3):
            expected = f"{c.image_size} x {c.image_size} and 3 channels"
            raise AvjaxError(f"images {pixels.shape[1:]}: expected {expected}; `prepare` resizes")
        x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="pre_norm")(self._embed(pixels, mask))
        mask = jnp.broadcast_to(mask[:, None], x.shape[:2])
        for block in _blocks(self):
            x = block(x, mask)
        if not self.projected:
            return x, mask
        x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="post_norm")(x[:, :1])
        return Project((c.joint,), dtype=self.dtype, bias=False, name="projection")(x), mask[:, :1]

    def _embed(self, pixels: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the class token and the patches with their positions, (b, 1 + patches, d)."""
        c = self.config
        tiles = images.unfold(jnp.where(mask[:, None, None, None], pixels, 0), c.grid)
        patches = Project((c.width,), inputs=3, dtype=self.dtype, bias=False, name="patches")(tiles)
        token = self.param("class_token", nn.initializers.normal(c.width**-0.5), (1, 1, c.width)).astype(self.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, c.steps(0), c.width)).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(token, (len(patches), 1, c.width)), patches], 1) + positions


class Text(nn.Module):
    """The text tower. Params are float32; `dtype` is the dtype of matrix products.

    `layer` is the number of blocks to compute; None: all, and the last normalisation. If `projected`, returns the
    embedding in the joint space.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    projected: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps token ids (b, l) int32 with mask (b, l) bool to hidden states (b, l, d) in `dtype`, and the mask.

        If `projected`, maps them to the embeddings (b, 1, joint) of the end tokens, not normalised, and mask (b, 1).

        Raises:
          AvjaxError: l exceeds the number of positions, or `projected` is combined with a `layer` below the last.
        """
        c = self.config
        if ids.shape[1] > c.positions:
            raise AvjaxError(f"{ids.shape[1]} word pieces, but this encoder has {c.positions} positions; truncate")
        ids = jnp.where(mask, ids, 0)  # an id outside the vocabulary would give NaN, even in the padding
        x = nn.Embed(c.vocab, c.width, dtype=self.dtype, name="words")(ids)  # b l d
        x += nn.Embed(c.positions, c.width, dtype=self.dtype, name="positions")(jnp.arange(ids.shape[1]))[None]
        visible, blocks = causal(mask), _blocks(self)
        for block in blocks:
            x = block(x, visible)
        if self.projected:
            x = jnp.take_along_axis(x, _end(ids, mask, c.end)[:, None, None], 1)
            mask = mask.any(1, keepdims=True)
        if len(blocks) == c.layers:
            x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="norm")(x)
        if self.projected:
            x = Project((c.joint,), dtype=self.dtype, bias=False, name="projection")(x)
        return x, mask


def _blocks(tower: Vision | Text) -> list[PreNormBlock]:
    """Makes the blocks that a tower computes; called while it is applied."""
    c = tower.config
    layers = base.block_count(tower.layer, c.layers)
    if tower.projected and layers != c.layers:
        raise AvjaxError(f"layer is {layers}, but embeddings are projected after the last, {c.layers}; ask for that")
    activation = base.activation(c.activation)
    return [PreNormBlock(c.heads, c.inner, activation, c.eps, tower.dtype, name=f"block_{i}") for i in range(layers)]


def _end(ids: jax.Array, mask: jax.Array, end: int) -> jax.Array:
    """Returns the position (b,) of the first end token of each text; 0 if there is none, as in the original.

    Files that state 2 as the end token are wrong: it then has the largest id.
    """
    marks = ids if end == 2 else (ids == end).astype(ids.dtype)
    return jnp.argmax(jnp.where(mask, marks, -1), 1)


class CLIP(nn.Module):
    """Both towers and the similarity of their embeddings. Params are float32; `dtype` is the dtype of products."""

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compares every image with every text.

        Args:
          pixels: images (n, h, w, 3), normalised, of the configured size.
          ids: (m, l) token ids.
          mask: (m, l) bool, True for real tokens; a text without any is similar to nothing.

        Returns:
          logits (n, m): exp(logit_scale) times the cosine of the two embeddings (Radford et al. 2021, figure 3); the
          embeddings (n, joint) of the images and (m, joint) of the texts, of norm 1. All are float32.

        Raises:
          AvjaxError: as for the towers.
        """
        present = jnp.ones(len(pixels), bool)
        vision = Vision(self.config.vision, self.dtype, projected=True, name="vision")
        text = Text(self.config.text, self.dtype, projected=True, name="text")
        image, sentence = _unit_vectors(*vision(pixels, present)), _unit_vectors(*text(ids, mask))
        scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        return jnp.exp(scale) * jnp.einsum("nd,md->nm", image, sentence), image, sentence


def _unit_vectors(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """Normalises embeddings (b, 1, d) with mask (b, 1) to (b, d) float32 of norm 1; zeros stay, with gradients."""
    x = jnp.where(mask[..., None], embeddings, 0)[:, 0].astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-30))


@dataclasses.dataclass(frozen=True)
class Family:
    """One tower as a family of `encoders.FAMILIES`.

    IGNORED matches the other tower, heads, and constants of older files. `projected` in methods includes the params
    of the projection.
    """

    name: str  # "vision" or "text"
    module: type[Vision] | type[Text]
    config: type[VisionConfig] | type[TextConfig]
    example: Callable[[Any], tuple[tuple[tuple[int, ...], Any], ...]]  # configuration → shapes and dtypes of inputs
    INPUTS: Inputs
    IGNORED: re.Pattern
    prepare: Callable[[Any, Mapping[str, Any]], tuple[np.ndarray, np.ndarray]] | None = None

    def build(self, config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Vision | Text:
        """Builds the module from the contents of a tower's config.json."""
        return self.module(self.config.from_hub(config), dtype, layer)

    def shapes(self, config: VisionConfig | TextConfig, projected: bool = False) -> dict[str, Any]:
        """Returns the shapes of the params of the module without computing them."""
        return base.shapes(self.module(config, projected=projected), *self.example(config))

    def convert(
        self, tensors: Mapping[str, np.ndarray], config: VisionConfig | TextConfig, projected: bool = False
    ) -> dict[str, Any]:
        """Converts a checkpoint of a whole CLIP or of this tower, with or without its prefix, to the module's params.

        Raises:
          AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
        """
        plain = {name.removeprefix(f"{self.name}_model."): tensor for name, tensor in tensors.items()}
        name_of = functools.partial(_torch_name, self.name)
        return weights.convert(plain, self.shapes(config, projected), name_of, self.IGNORED)


def prepare(raw: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Prepares RGB frames, as for `images.prepare`: returns inputs (n, h, w, 3) and mask (n,), all True."""
    pixels = images.prepare(raw, settings, "CLIPImageProcessor")
    return pixels, np.ones(len(pixels), bool)


def _image_example(config: VisionConfig) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return ((1, config.image_size, config.image_size, 3), jnp.float32), ((1,), jnp.bool_)


def _text_example(config: TextConfig) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return ((1, 1), jnp.int32), ((1, 1), jnp.bool_)


VISION = Family(
    "vision",
    Vision,
    VisionConfig,
    _image_example,
    Inputs("images (batch, height, width, 3)", rank=4, length_axis=None),
    re.compile(
        r"^(text_model|text_projection|visual_projection|post_layernorm|classifier)\.|^logit_scale$"
        r"|^embeddings\.position_ids$"
    ),
    prepare,
)
TEXT = Family(
    "text",
    Text,
    TextConfig,
    _text_example,
    Inputs("token ids (batch, length)", rank=2, length_axis=1, least=8, text=True),
    re.compile(r"^(vision_model|visual_projection|text_projection)\.|^logit_scale$|^embeddings\.position_ids$"),
)


def shapes(config: CLIPConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `CLIP(config)` without computing them."""
    return base.shapes(CLIP(config), _image_example(config.vision)[0], *_text_example(config.text))


def convert(tensors: Mapping[str, np.ndarray], config: CLIPConfig) -> dict[str, Any]:
    """Converts a checkpoint of a whole CLIP to the params of `CLIP(config)`; errors as for the towers."""
    return weights.convert(tensors, shapes(config), _joint_name, _CONSTANTS)


_CONSTANTS = re.compile(r"^(vision|text)_model\.embeddings\.position_ids$")
_NAMES = {
    "vision": {
        "patches": "embeddings.patch_embedding",
        "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
        "post_norm": "post_layernorm",
        "projection": "visual_projection",
    },
    "text": {
        "words": "embeddings.token_embedding",
        "positions": "embeddings.position_embedding",
        "norm": "final_layer_norm",
        "projection": "text_projection",
    },
}
_BLOCK = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def _torch_name(tower: str, path: str) -> str:
    return base.torch_name(path, _NAMES[tower], "encoder.layers", _BLOCK)


def _joint_name(path: str) -> str:
    tower, _, rest = path.partition("/")
    if not rest:
        return path  # logit_scale
    name = _torch_name(tower, rest)
    return name if rest == "projection" else f"{tower}_model.{name}"
