"""Perceiver IO for optical flow (Jaegle et al. 2022, section 4.2): two frames → displacement of every pixel.

The latents attend to the pixels, then 24 times to each other, then every pixel attends to the latents. A pair of the
trained size has 182,528 pixels and 2,048 latents, so 374 million scores each way, which are computed for a few rows of
the frame at a time. The flow is in units of 20 pixels, x (to the right) before y (down); `optical_flow` scales it to
pixels, and takes frames of any size.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.encoders import base, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError
from avjax.layers import PreNormBlock, Project

INPUTS = Inputs("pairs of images (batch, 2, height, width, 3)", rank=5, length_axis=None)
# Pixels whose scores are computed at a time, all pairs together: at most 67 MB of them for 2,048 latents.
_PIXELS = 8192
_EPS = 1e-5  # of layer normalisation: the original uses PyTorch's default, whatever config.json states
_BANDS = 64  # frequencies of the positions, along either axis
_FEATURES = 64  # of the patch around a pixel
_WIDTH = _FEATURES + 2 * (1 + 2 * _BANDS)  # of a pixel: 322
_RESCALE = 100.0  # the network's output is this multiple of the flow
_SCALE = 20.0  # pixels in one unit of flow: DeepMind trained on flow divided by this
_OVERLAP = 20  # least overlap of neighbouring tiles in pixels, as in DeepMind's notebook


@dataclasses.dataclass(frozen=True)
class PerceiverConfig(base.ImageConfig):
    """Architecture of a checkpoint; widths are numbers of units, sizes of frames are in pixels."""

    image_size: tuple[int, int]  # height and width of the frames of all pairs, as in training
    latents: int
    latent_width: int
    depth: int  # blocks of self-attention
    rounds: int  # passes through them, with the same params
    heads: int
    cross_heads: int  # of the attention to the pixels
    shape: str  # cross-attentions project queries and keys to the width of keys ("kv") or queries ("q")
    widening: int  # factor from the width to that of the feed-forward layers in blocks
    cross_widening: int  # and in the cross-attention of the latents to the pixels
    activation: str
    residual: bool  # whether that cross-attention adds its input, the latents, to its output

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "PerceiverConfig":
        """Reads the contents of the hub's config.json.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        fields = base.read(_DEFAULTS | dict(config), _KEYS)
        _check(config, fields)
        return cls(**fields | {"image_size": tuple(fields["image_size"])})

    @property
    def width(self) -> int:
        """Returns the width of the flow: x and y."""
        return 2

    @property
    def layers(self) -> int:
        """Returns 0: only the last layer gives features of the pixels."""
        return 0

    def steps(self, length: int) -> int:
        """Returns the number of pixels of a frame; `length` is ignored."""
        return self.image_size[0] * self.image_size[1]

    def scored(self, queries: int, keys: int) -> int:
        """Returns the width to which a cross-attention projects queries and keys of these widths."""
        return keys if self.shape == "kv" else queries


_KEYS = {
    "image_size": "train_size",
    "latents": "num_latents",
    "latent_width": "d_latents",
    "depth": "num_self_attends_per_block",
    "rounds": "num_blocks",
    "heads": "num_self_attention_heads",
    "cross_heads": "num_cross_attention_heads",
    "shape": "cross_attention_shape_for_attention",
    "widening": "self_attention_widening_factor",
    "cross_widening": "cross_attention_widening_factor",
    "activation": "hidden_act",
    "residual": "use_query_residual",
}
_DEFAULTS = {
    "train_size": (368, 496),
    "num_blocks": 1,
    "cross_attention_shape_for_attention": "kv",
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "use_query_residual": True,
}


def _check(config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    base.activation(fields["activation"])
    if (named := config.get("architectures") or ["PerceiverForOpticalFlow"]) != ["PerceiverForOpticalFlow"]:
        raise AvjaxError(
            f"architectures is {named} in config.json: the only supported Perceiver is that for optical flow"
        )
    if config.get("qk_channels") is not None or config.get("v_channels") is not None:
        raise AvjaxError("qk_channels and v_channels in config.json: expected null, as in the flow's checkpoint")
    if fields["shape"] not in ("kv", "q"):
        raise AvjaxError(f"cross_attention_shape_for_attention is {fields['shape']!r} in config.json, expected kv or q")
    latent, cross = fields["latent_width"], fields["cross_heads"]
    if latent % fields["heads"] or latent % cross or (fields["shape"] == "kv" and _WIDTH % cross):
        raise AvjaxError(
            f"{fields['heads']} heads, and {cross} to the pixels, in config.json: expected divisors of the "
            f"widths {latent} of the latents and, for the latter, {_WIDTH} of the pixels"
        )


class Perceiver(nn.Module):
    """The network for optical flow. Params are float32; `dtype` is the dtype of matrix products.

    A pair of the trained size takes 1.4 tera floating-point operations and, on a CPU, 0.3 GB beside the params (four
    pairs at once: 0.8 GB); all scores at once would take 1.5 GB each way.
    """

    config: PerceiverConfig
    dtype: jnp.dtype = jnp.float32
    layer: None = None  # there are no intermediate features

    @nn.compact
    def __call__(self, pairs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps pairs of frames (b, 2, h, w, 3) in [-1, 1] with mask (b,) bool to the flow from first to second.

        Returns:
          flow (b, h·w, 2), row by row, x before y, in units of 20 pixels: the `logits` of transformers'
          PerceiverForOpticalFlow, float32 for any `dtype`; and mask (b, h·w), the same for all pixels of a pair.

        Raises:
          AvjaxError: the frames are not of the trained size.
        """
        c = self.config
        if pairs.shape[1:] != (2, *c.image_size, 3):
            height, width = c.image_size
            raise AvjaxError(f"pairs {pairs.shape}: expected (batch, 2, {height}, {width}, 3); see `optical_flow`")
        pairs = jnp.where(mask[:, None, None, None, None], pairs, 0)
        pixels = Pixels.of(Project((_FEATURES,), dtype=self.dtype, name="patches")(_patches(pairs)))
        latents = self.param("latents", nn.initializers.normal(0.02), (c.latents, c.latent_width))
        latents = jnp.broadcast_to(latents.astype(self.dtype), (len(pairs), *latents.shape))
        latents = self._self_attend(LatentAttention(c, self.dtype, name="reading")(latents, pixels))
        flow = PixelAttention(c, self.dtype, name="decoding")(pixels, latents)
        return flow, jnp.broadcast_to(mask[:, None], flow.shape[:2])

    def _self_attend(self, latents: jax.Array) -> jax.Array:
        c = self.config
        activation, inner = base.activation(c.activation), c.widening * c.latent_width
        blocks = [PreNormBlock(c.heads, inner, activation, _EPS, self.dtype, name=f"block_{i}") for i in range(c.depth)]
        for block in c.rounds * blocks:
            latents = block(latents, jnp.ones(latents.shape[:2], bool))
        return latents


def _patches(pairs: jax.Array) -> jax.Array:
    """Maps (b, 2, h, w, 3) to (b, h, w, 54): 3 x 3 pixels around each by frame, row, column, colour; 0 outside."""
    height, width = pairs.shape[2:4]
    padded = jnp.pad(pairs, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    shifts = itertools.product(range(2), range(3), range(3))
    return jnp.concatenate([padded[:, frame, y : y + height, x : x + width] for frame, y, x in shifts], -1)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels of frames in portions of a few rows.

    Attributes:
      portions: to scan over: features (portions, b, rows, w, 64) of the patches, and positional features of the rows
        (portions, rows, 129).
      columns: (w, 129) positional features of the columns.
    """

    portions: tuple[jax.Array, jax.Array]
    columns: jax.Array

    @classmethod
    def of(cls, features: jax.Array) -> "Pixels":
        """Makes the pixels from features (b, h, w, 64) of the patches."""
        b, height, width, _ = features.shape
        rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * b * width <= _PIXELS))
        features = jnp.moveaxis(features.reshape(b, -1, rows, *features.shape[2:]), 1, 0)
        return cls((features, _positions(height).reshape(-1, rows, 1 + 2 * _BANDS)), _positions(width))

    def normalised(self, portion: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Returns the pixels (b, rows·w, 322) of a portion, layer-normalised without scale and bias.

        They are features, then coordinates, sines and cosines, each of the row before that of the column.
        """
        features, rows = portion
        grid = (*features.shape[1:3], 1 + 2 * _BANDS)
        along = jnp.stack([jnp.broadcast_to(rows[:, None], grid), jnp.broadcast_to(self.columns[None], grid)], 2)
        kinds = jnp.split(along, [1, 1 + _BANDS], -1)
        positions = jnp.concatenate([kind.reshape(*grid[:2], -1) for kind in kinds], -1)
        positions = jnp.broadcast_to(positions, (len(features), *positions.shape))
        x = jnp.concatenate([features.astype(jnp.float32), positions], -1).reshape(len(features), -1, _WIDTH)
        variance = jnp.var(x, -1, keepdims=True)  # the default is a difference of two means
        return jax.nn.standardize(x, variance=variance, epsilon=_EPS).astype(features.dtype)


def _positions(size: int) -> jax.Array:
    """Computes Fourier features (size, 129) of an axis (section 3.2): coordinate in [-1, 1], 64 sines, 64 cosines."""
    coordinate = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    angle = np.float32(np.pi) * (coordinate * np.linspace(1, size / 2, _BANDS, dtype=np.float32))
    return jnp.concatenate([coordinate, np.sin(angle), np.cos(angle)], 1)


class Affine(nn.Module):
    """The params of an affine map that is folded into others: kernel (inputs, *outputs), bias (*outputs)."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[1:])


class Scale(nn.Module):
    """The params of a layer normalisation of pixels that is folded into affine maps: scale and bias (322,)."""

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns scale and bias."""
        scale = self.param("scale", nn.initializers.ones, (_WIDTH,))
        return scale, self.param("bias", nn.initializers.zeros, (_WIDTH,))


class FeedForward(nn.Module):
    """The feed-forward layer after an attention, with its normalisation and residual."""

    widening: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (b, l, d) to (b, l, d)."""
        width = x.shape[-1]
        hidden = nn.LayerNorm(_EPS, self.dtype, use_fast_variance=False, name="norm")(x)
        hidden = self.activation(Project((self.widening * width,), dtype=self.dtype, name="up")(hidden))
        return x + Project((width,), dtype=self.dtype, name="down")(hidden)


class LatentAttention(nn.Module):
    """Cross-attention of the latents to the pixels, with a feed-forward layer.

    The original applies scale and bias of the norm and the maps to keys and values to every pixel. This layer applies
    them to the few latents, before and after the attention: sums of products may be reordered, and a term common to all
    scores of a latent cancels in its softmax.
    """

    config: PerceiverConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array, pixels: Pixels) -> jax.Array:
        """Maps latents (b, l, d) to (b, l, d)."""
        c = self.config
        scored = c.scored(c.latent_width, _WIDTH)
        split = (c.cross_heads, scored // c.cross_heads)
        query = nn.LayerNorm(_EPS, use_fast_variance=False, name="query_norm")(latents)
        query = Project(split, name="query")(query) / np.sqrt(split[1])
        key, _ = Affine((_WIDTH, *split), name="key")()
        value, value_bias = Affine((_WIDTH, *split), name="value")()
        scale, bias = Scale(name="key_norm")()
        folded = jnp.einsum("blhe,ihe->bhli", query, key) * scale[None, None, None]
        attended = _attend(folded.astype(self.dtype), pixels) * scale[None, None, None] + bias[None, None, None]
        context = jnp.einsum("bhli,ihe->blhe", attended, value) + value_bias[None, None]
        out = Project(latents.shape[-1:], inputs=2, dtype=self.dtype, name="out")(context)
        activation = base.activation(c.activation)
        x = latents + out if c.residual else out
        return FeedForward(c.cross_widening, activation, self.dtype, name="feed_forward")(x)


def _attend(query: jax.Array, pixels: Pixels) -> jax.Array:
    """Computes the softmax-weighted mean of pixels (b, h, l, 322), float32, for queries (b, h, l, 322).

    It goes portion by portion and rescales its sums when a higher score occurs (Milakov and Gimelshein 2018).
    """

    def step(sums: tuple[jax.Array, jax.Array, jax.Array], portion: jax.Array) -> Any:
        top, total, summed = sums
        x = pixels.normalised(portion)
        scores = jnp.einsum("bhli,bpi->bhlp", query, x, preferred_element_type=jnp.float32)
        higher = jnp.maximum(top, jnp.max(scores, -1))
        decay, terms = jnp.exp(top - higher), jnp.exp(scores - higher[..., None])
        part = jnp.einsum("bhlp,bpi->bhli", terms.astype(x.dtype), x, preferred_element_type=jnp.float32)
        return (higher, total * decay + jnp.sum(terms, -1), summed * decay[..., None] + part), None

    zeros = jnp.zeros(query.shape[:3], jnp.float32)
    start = (zeros - jnp.inf, zeros, jnp.zeros(query.shape, jnp.float32))
    (_, total, summed), _ = jax.lax.scan(step, start, pixels.portions)
    return summed / total[..., None]


class PixelAttention(nn.Module):
    """Cross-attention of every pixel to the latents, a feed-forward layer, and the flow; folds as `LatentAttention`."""

    config: PerceiverConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Pixels, latents: jax.Array) -> jax.Array:
        """Computes the flow (b, pixels, 2), float32, from latents (b, l, d)."""
        key, offset, value, bias = self._folded(latents)

        def step(module: nn.Module, _: None, portion: jax.Array) -> Any:
            x = pixels.normalised(portion)
            scores = jnp.einsum("bpi,bli->bpl", x, key, preferred_element_type=jnp.float32) + offset[:, None]
            terms = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
            summed = jnp.einsum("bpl,bli->bpi", terms.astype(x.dtype), value, preferred_element_type=jnp.float32)
            context = summed / jnp.sum(terms, -1, keepdims=True) + bias[None, None]
            return None, module._flow(context.astype(module.dtype))

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, flow = scan(self, None, pixels.portions)
        return jnp.moveaxis(flow, 1, 0).reshape(len(latents), -1, 2) / _RESCALE

    def _folded(self, latents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns folded keys (b, l, 322), an offset (b, l) of their scores, values (b, l, 322) and their bias."""
        scored = self.config.scored(_WIDTH, latents.shape[-1])
        latents = nn.LayerNorm(_EPS, use_fast_variance=False, name="key_norm")(latents)
        key = Project((scored,), name="key")(latents) / np.sqrt(scored)
        value = Project((scored,), name="value")(latents)
        scale, norm_bias = Scale(name="query_norm")()
        query, query_bias = Affine((_WIDTH, scored), name="query")()
        out, bias = Affine((scored, _WIDTH), name="out")()
        folded = jnp.einsum("ble,ie->bli", key, query * scale[:, None])
        return folded.astype(self.dtype), key @ (norm_bias @ query + query_bias), (value @ out).astype(self.dtype), bias

    def _flow(self, context: jax.Array) -> jax.Array:
        activation = base.activation(self.config.activation)
        x = FeedForward(1, activation, self.dtype, name="feed_forward")(context)
        return Project((2,), name="flow")(x)


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Perceiver:
    """Builds the module from the contents of a hub config.json.

    Raises:
      AvjaxError: a `layer` or an unsupported variant is asked for.
    """
    if layer is not None:
        raise AvjaxError(f"layer is {layer}, but a perceiver gives the flow alone; leave the layer out")
    return Perceiver(PerceiverConfig.from_hub(config), dtype)


def shapes(config: PerceiverConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `Perceiver(config)` without computing them."""
    return base.shapes(Perceiver(config), ((1, 2, *config.image_size, 3), jnp.float32), ((1,), jnp.bool_))


_TOP = {
    "patches": "input_preprocessor.conv_after_patches",
    "latents": "embeddings.latents",
    "reading": "encoder.cross_attention",
    "decoding": "decoder.decoder.decoding_cross_attention",
    "decoding/flow": "decoder.decoder.final_layer",
}
_LAYER = {
    "query_norm": "attention.self.layernorm1",
    "key_norm": "attention.self.layernorm2",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm": "layernorm",
    "up": "mlp.dense1",
    "down": "mlp.dense2",
}
IGNORED = re.compile(r"(?!)")  # every tensor of the checkpoint is used


def convert(tensors: Mapping[str, np.ndarray], config: PerceiverConfig) -> dict[str, Any]:
    """Converts a PyTorch checkpoint, with or without its model's prefix, to the params of `Perceiver(config)`.

    Raises:
      AvjaxError: tensors are missing, left over, or of a wrong shape; the message names them.
    """
    plain = {name.removeprefix("perceiver."): tensor for name, tensor in tensors.items()}
    return weights.convert(plain, shapes(config), _torch_name, IGNORED)


def _torch_name(path: str) -> str:
    if path in _TOP:
        return _TOP[path]
    layer, _, rest = path.partition("/")
    if layer in _TOP:
        return f"{_TOP[layer]}.{_LAYER[rest.removeprefix('feed_forward/')]}"
    # The checkpoint names the first norm of a self-attention as that of its queries.
    rest = rest.replace("attention_norm", "query_norm").removeprefix("attention/")
    return f"encoder.self_attends.{layer.removeprefix('block_')}.{_LAYER[rest]}"


def prepare(raw: np.ndarray, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scales pairs of RGB frames of the trained size, uint8 (n, 2, h, w, 3), to [-1, 1], float32, with mask (n,).

    This follows DeepMind's notebook. `settings` are ignored: the image processor in the checkpoint's folder is that of
    other Perceivers.

    Raises:
      AvjaxError: the pairs have a wrong shape or dtype.
    """
    raw = np.asarray(raw)
    if raw.ndim != 5 or raw.shape[1] != 2 or raw.shape[-1] != 3 or raw.dtype != np.uint8:
        raise AvjaxError(f"pairs {raw.shape} {raw.dtype}: expected RGB images (pairs, 2, height, width, 3) uint8")
    levels = (np.arange(256) / 255 * 2 - 1).astype(np.float32)
    return levels[raw], np.ones(len(raw), bool)


def optical_flow(encoder: Any, first: np.ndarray, second: np.ndarray, *, batch: int = 1) -> np.ndarray:
    """Computes the displacement of each pixel from the first frame to the second, for frames of any size.

    Frames are cut into tiles of the trained size, as in DeepMind's notebook: neighbours overlap by at least 20 pixels,
    the last ends at the edge, and overlapping tiles are weighted by a pixel's distance to their border. Smaller frames
    are padded to a tile by repeating their edge to the right and below.

    Args:
      encoder: of this family, as returned by `encoders.load`; called with (pairs, mask), has `config.image_size`.
      first: n RGB frames, uint8 (n, h, w, 3).
      second: the frames that follow, like `first`.
      batch: tiles in one call; memory grows with it, and with n only for frames and flow.

    Returns:
      (n, h, w, 2) float32, in pixels: x (to the right), then y (down).

    Raises:
      AvjaxError: frames have a wrong shape or dtype, or exceed tiles that are not wider than their overlap.
    """
    _check_frames(first, second)
    tile, count = encoder.config.image_size, len(first)
    parts = _parts(first.shape[1:3], tile)
    tile_weights = _tile_weights(first.shape[1:3], tile, parts)
    flow = np.zeros((*first.shape[:3], 2), np.float32)
    tiles = list(itertools.product(range(count), range(len(parts))))
    for start in range(0, len(tiles), batch):
        chunk = tiles[start : start + batch]
        pairs = np.stack([_filled(np.stack([first[n][parts[k]], second[n][parts[k]]]), tile) for n, k in chunk])
        pieces, _ = encoder(*prepare(pairs, {}))
        for (n, k), piece in zip(chunk, pieces.reshape(-1, *tile, 2), strict=True):
            part = flow[n][parts[k]]
            part += _SCALE * tile_weights[k][..., None] * piece[: part.shape[0], : part.shape[1]]
    return flow


def _check_frames(first: np.ndarray, second: np.ndarray) -> None:
    valid = first.ndim == 4 and first.shape[-1] == 3 and first.dtype == np.uint8 and 0 not in first.shape[1:]
    if not valid or second.shape != first.shape or second.dtype != first.dtype:
        raise AvjaxError(
            f"frames {first.shape} {first.dtype} and {second.shape} {second.dtype}: expected the same number of RGB "
            "frames (n, height, width, 3) uint8 twice, of one size"
        )


def _parts(size: tuple[int, int], tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Returns the evenly spaced parts of frames of `size` that become tiles."""
    spans = [[slice(at, at + t) for at in _starts(s, t)] for s, t in zip(size, tile, strict=True)]
    return list(itertools.product(*spans))


def _starts(size: int, tile: int) -> np.ndarray:
    if size <= tile:
        return np.zeros(1, int)
    if tile <= _OVERLAP:
        raise AvjaxError(f"a frame has {size} pixels along a side, but tiles of {tile} cannot overlap by {_OVERLAP}")
    count = -(-(size - _OVERLAP) // (tile - _OVERLAP))
    return np.linspace(0, size - tile, count).round().astype(int)


def _tile_weights(size: tuple[int, int], tile: tuple[int, int], parts: list[tuple[slice, slice]]) -> list[np.ndarray]:
    """Returns the weight of each tile at its pixels within the frame; weights sum to 1 at each pixel."""
    distances = [np.minimum(np.arange(1, t + 1), np.arange(t, 0, -1)) for t in tile]  # from the border
    weight = np.minimum(*np.ix_(*distances)).astype(np.float32)[: size[0], : size[1]]
    total = np.zeros(size, np.float32)
    for part in parts:
        total[part] += weight
    return [weight / total[part] for part in parts]


def _filled(pair: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Pads a pair (2, h, w, 3) to the size of a tile by repeating its edges."""
    missing = [(0, want - have) for want, have in zip(tile, pair.shape[1:3], strict=True)]
    return np.pad(pair, [(0, 0), *missing, (0, 0)], mode="edge")
