"""CLIP (Radford et al. 2021): a tower for pictures and a tower for texts, whose embeddings lie in one joint space.

The tower of pictures is a ViT that normalises before its first block; that of texts is causal, so that its end token
has seen the whole text.
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
    """What both towers have; widths in numbers of units."""

    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    activation: str
    eps: float  # of layer normalisation
    joint: int  # width of the joint space


@dataclasses.dataclass(frozen=True)
class VisionConfig(_TowerConfig, base.OfImages):
    """Architecture of a tower of pictures, which are squares; pictures and patches in pixels."""

    picture: int
    patch: int

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Reads the contents of the hub's config.json, or what `tower_config` makes of it.

        Raises:
          AvjaxError: a value is missing, or asks for a variant that this module does not compute.
        """
        read = _read(config, {"picture": "image_size", "patch": "patch_size"})
        if config.get("num_channels", 3) != 3:
            raise AvjaxError(f"num_channels is {config['num_channels']} in config.json, expected 3: images are RGB")
        sides = read["picture"], read["patch"]
        if not all(isinstance(side, int) for side in sides) or sides[0] % sides[1]:
            raise AvjaxError(
                f"image_size {sides[0]} and patch_size {sides[1]} in config.json: expected one number each, the first "
                "a multiple of the second"
            )
        return cls(**read)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.picture // self.patch,) * 2

    def steps(self, length: int) -> int:
        """How many features a picture has, class token included; `length` does not count."""
        return 1 + math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class TextConfig(_TowerConfig, base.OfWords):
    """Architecture of a tower of texts."""

    vocab: int
    positions: int  # the longest text, in word pieces
    end: int  # the id of the token that ends a text; 2 in older files, whatever it is

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Reads the contents of the hub's config.json, or what `tower_config` makes of it.

        Raises:
          AvjaxError: a value is missing, or asks for a variant that this module does not compute.
        """
        read = _read(config, {"vocab": "vocab_size", "positions": "max_position_embeddings", "end": "eos_token_id"})
        if not isinstance(read["end"], int):
            raise AvjaxError(f"eos_token_id is {read['end']} in config.json, expected one id")
        return cls(**read)


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
# What the original's configuration classes say where a file is silent; of ViT-B/32, nested configurations leave out
# even the sizes.
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
    read = base.read(_ASSUMED | dict(config), _KEYS | own)
    base.activation(read["activation"])
    return read


def tower_config(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """Of the contents of a whole CLIP's config.json, those that a single tower's would have.

    Args:
      config: `model_type` is "clip"; the towers' own configurations are nested in it, and leave out what is as in
        ViT-B/32. In older files "vision_config_dict" and "text_config_dict" outrank them.
      tower: "vision" or "text".
    Returns:
      The tower's configuration, complete, of model_type "clip_vision_model" or "clip_text_model", with the
      `projection_dim` of the whole.
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
    """The tower of pictures. Params are float32; `dtype` is that of the matrix products.

    `layer` is how many blocks are computed; None = all. `projected` asks for the embedding in the joint space instead.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    projected: bool = False

    @nn.compact
    def __call__(self, pictures: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps normalised pictures (b, h, w, 3) to hidden states (b, 1 + patches, d) in `dtype`, and their mask.

        Args:
          pictures: of the configured size.
          mask: (b,) bool, which pictures are real.
        Returns:
          features, the class token first, then the patches row by row; mask (b, 1 + patches), each picture's own. When
          `projected`, the embeddings (b, 1, joint), not normalised, and mask (b, 1).
        Raises:
          AvjaxError: the pictures have another size, or `projected` goes with a `layer` below the last.
        """
        c = self.config
        if pictures.shape[1:] != (c.picture, c.picture, 3):
            expected = f"{c.picture} x {c.picture} and 3 channels"
            raise AvjaxError(f"images {pictures.shape[1:]}: expected {expected}; `prepare` resizes")
        x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="pre_norm")(self._embed(pictures, mask))
        mask = jnp.broadcast_to(mask[:, None], x.shape[:2])
        for block in _blocks(self):
            x = block(x, mask)
        if not self.projected:
            return x, mask
        x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="post_norm")(x[:, :1])
        return Project((c.joint,), dtype=self.dtype, bias=False, name="projection")(x), mask[:, :1]

    def _embed(self, pictures: jax.Array, mask: jax.Array) -> jax.Array:
        """The class token and the patches with their positions, (b, 1 + patches, d)."""
        c = self.config
        tiles = images.unfold(jnp.where(mask[:, None, None, None], pictures, 0), c.grid)
        patches = Project((c.width,), inputs=3, dtype=self.dtype, bias=False, name="patches")(tiles)
        token = self.param("class_token", nn.initializers.normal(c.width**-0.5), (1, 1, c.width)).astype(self.dtype)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, c.steps(0), c.width)).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(token, (len(patches), 1, c.width)), patches], 1) + positions


class Text(nn.Module):
    """The tower of texts. Params are float32; `dtype` is that of the matrix products.

    `layer` is how many blocks are computed; None = all, and the last normalisation. `projected` asks for the embedding
    in the joint space instead.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    projected: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps word pieces ids (b, l) int32 under mask (b, l) bool to hidden states (b, l, d) in `dtype`, and the mask.

        When `projected`, to the embeddings (b, 1, joint) of the end tokens, not normalised, and mask (b, 1).

        Raises:
          AvjaxError: l exceeds the number of positions, or `projected` goes with a `layer` below the last.
        """
        c = self.config
        if ids.shape[1] > c.positions:
            raise AvjaxError(f"{ids.shape[1]} word pieces, but this encoder has {c.positions} positions; truncate")
        ids = jnp.where(mask, ids, 0)  # an id that the vocabulary lacks would bring NaN in from under the padding
        x = nn.Embed(c.vocab, c.width, dtype=self.dtype, name="words")(ids)  # b l d
        x += nn.Embed(c.positions, c.width, dtype=self.dtype, name="positions")(jnp.arange(ids.shape[1]))[None]
        past, blocks = causal(mask), _blocks(self)
        for block in blocks:
            x = block(x, past)
        if self.projected:
            x = jnp.take_along_axis(x, _end(ids, mask, c.end)[:, None, None], 1)
            mask = mask.any(1, keepdims=True)
        if len(blocks) == c.layers:
            x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="norm")(x)
        if self.projected:
            x = Project((c.joint,), dtype=self.dtype, bias=False, name="projection")(x)
        return x, mask


def _blocks(tower: Vision | Text) -> list[PreNormBlock]:
    """The blocks that a tower computes; to be called while it is applied."""
    c = tower.config
    layers = base.known_layer(tower.layer, c.layers)
    if tower.projected and layers != c.layers:
        raise AvjaxError(f"layer is {layers}, but embeddings are projected after the last, {c.layers}; ask for that")
    activation = base.activation(c.activation)
    return [PreNormBlock(c.heads, c.inner, activation, c.eps, tower.dtype, name=f"block_{i}") for i in range(layers)]


def _end(ids: jax.Array, mask: jax.Array, end: int) -> jax.Array:
    """Where (b,) the first end token of each text is; 0 where there is none, as in the original.

    Files that call the end token 2 are wrong: theirs has the largest id of all.
    """
    marks = ids if end == 2 else (ids == end).astype(ids.dtype)
    return jnp.argmax(jnp.where(mask, marks, -1), 1)


class CLIP(nn.Module):
    """Both towers, and how alike what they see is. Params are float32; `dtype` is that of the towers' products."""

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pictures: jax.Array, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compares every picture with every text.

        Args:
          pictures: (n, h, w, 3), normalised, of the configured size.
          ids, mask: (m, l) word pieces and which of them are real; a text without any is like nothing.
        Returns:
          logits (n, m): exp(logit_scale) times the cosine of the two embeddings (Radford et al. 2021, figure 3); the
          embeddings (n, joint) of the pictures and (m, joint) of the texts, of length 1. All are float32.
        Raises:
          AvjaxError: as of the towers.
        """
        seen = jnp.ones(len(pictures), bool)
        vision = Vision(self.config.vision, self.dtype, projected=True, name="vision")
        text = Text(self.config.text, self.dtype, projected=True, name="text")
        shown, told = _directions(*vision(pictures, seen)), _directions(*text(ids, mask))
        scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        return jnp.exp(scale) * jnp.einsum("nd,md->nm", shown, told), shown, told


def _directions(embeddings: jax.Array, mask: jax.Array) -> jax.Array:
    """Embeddings (b, 1, d) under mask (b, 1) → (b, d) float32 of length 1; zeros stay zeros, and have gradients."""
    x = jnp.where(mask[..., None], embeddings, 0)[:, 0].astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-30))


@dataclasses.dataclass(frozen=True)
class Family:
    """One tower as `encoders.FAMILIES` has it. IGNORED are the other tower, heads, and constants of older files.

    `projected` in its methods: with the params of the projection, as the module has them then.
    """

    name: str  # "vision" or "text"
    module: type[Vision] | type[Text]
    config: type[VisionConfig] | type[TextConfig]
    example: Callable[[Any], tuple[tuple[tuple[int, ...], Any], ...]]  # configuration → shape and dtype of its inputs
    INPUTS: Inputs
    IGNORED: re.Pattern
    prepare: Callable[[Any, Mapping[str, Any]], tuple[np.ndarray, np.ndarray]] | None = None

    def build(self, config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Vision | Text:
        """The module for the contents of a tower's config.json."""
        return self.module(self.config.from_hub(config), dtype, layer)

    def shapes(self, config: VisionConfig | TextConfig, projected: bool = False) -> dict[str, Any]:
        """The params of the module as shapes, without computing them."""
        return base.shapes(self.module(config, projected=projected), *self.example(config))

    def convert(
        self, tensors: Mapping[str, np.ndarray], config: VisionConfig | TextConfig, projected: bool = False
    ) -> dict[str, Any]:
        """The module's params out of a checkpoint of a whole CLIP or of this tower, with or without its prefix.

        Raises:
          AvjaxError: tensors are missing, left over and not IGNORED, or of another shape; the message names them.
        """
        plain = {name.removeprefix(f"{self.name}_model."): tensor for name, tensor in tensors.items()}
        name_of = functools.partial(_torch_name, self.name)
        return weights.convert(plain, self.shapes(config, projected), name_of, self.IGNORED)


def prepare(raw: np.ndarray | Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """RGB frames as `images.prepare` takes them → inputs (n, h, w, 3) and mask (n,), all True."""
    pictures = images.prepare(raw, settings, "CLIPImageProcessor")
    return pictures, np.ones(len(pictures), bool)


def _picture(config: VisionConfig) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return ((1, config.picture, config.picture, 3), jnp.float32), ((1,), jnp.bool_)


def _word(config: TextConfig) -> tuple[tuple[tuple[int, ...], Any], ...]:
    return ((1, 1), jnp.int32), ((1, 1), jnp.bool_)


VISION = Family(
    "vision",
    Vision,
    VisionConfig,
    _picture,
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
    _word,
    Inputs("token ids (batch, length)", rank=2, length_axis=1, least=8, text=True),
    re.compile(r"^(vision_model|visual_projection|text_projection)\.|^logit_scale$|^embeddings\.position_ids$"),
)


def shapes(config: CLIPConfig) -> dict[str, Any]:
    """The params of `CLIP(config)` as shapes, without computing them."""
    return base.shapes(CLIP(config), _picture(config.vision)[0], *_word(config.text))


def convert(tensors: Mapping[str, np.ndarray], config: CLIPConfig) -> dict[str, Any]:
    """Params of `CLIP(config)` out of a checkpoint of a whole CLIP; errors as of the towers' conversion."""
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
