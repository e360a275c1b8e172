"""wav2vec 2.0 (Baevski et al. 2020) and data2vec for speech (Baevski et al. 2022): waveform → a vector every 20 ms.

Both consist of strided convolutions, positional convolutions and transformer layers; they differ in norms and in the
positional convolutions. Convolutions are left to XLA: on a CPU, even its grouped ones are faster than matrix products
of blocks, patches or taps (except for kernels of 2, which cost little), and they need the least memory.
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

from avjax.encoders import base, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError
from avjax.layers import PostNormBlock, PreNormBlock, Project

RATE = 16_000  # samples a second
INPUTS = Inputs("waveforms (batch, samples) at 16 kHz", rank=2, length_axis=1, prefix=True, least=512)
_EPS = 1e-5  # of the norms within convolutions, which config.json does not specify


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Architecture of a checkpoint; widths are numbers of units."""

    model_type: str  # "wav2vec2" or "data2vec-audio"
    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    convs: tuple[tuple[int, int, int], ...]  # width, kernel and stride of each convolution of the front end
    conv_bias: bool
    conv_norm: str  # "group": each channel over time, first convolution only; "layer": over channels, all convolutions
    conv_activation: str
    positions: tuple[int, ...]  # kernels of the positional convolutions
    position_groups: int
    stable: bool  # whether blocks normalise before rather than after their branches
    activation: str
    eps: float  # of layer normalisation

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "Wav2Vec2Config":
        """Reads the contents of the hub's config.json.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        if config.get("add_adapter") or config.get("adapter_attn_dim") is not None:
            raise AvjaxError("adapters (add_adapter, adapter_attn_dim) are not supported; take a checkpoint without")
        kind = config["model_type"]
        values = base.read(_DEFAULTS[kind] | dict(config), _KEYS)
        fields = values | _VARIANTS[kind](_DEFAULTS[kind] | dict(config)) | {"convs": _convs(config)}
        if fields["conv_norm"] not in ("group", "layer"):
            raise AvjaxError(f"feat_extract_norm is {fields['conv_norm']!r}, expected 'group' or 'layer'")
        base.activation(fields["activation"])
        base.activation(fields["conv_activation"])
        return cls(**fields)

    @property
    def longest(self) -> None:
        """Returns None: there is no longest input."""
        return None

    @property
    def least(self) -> int:
        """Returns the shortest input with a feature, in samples."""
        return functools.reduce(lambda steps, conv: (steps - 1) * conv[2] + conv[1], reversed(self.convs), 1)

    def steps(self, length: int) -> int:
        """Returns the number of features of an input of `length` samples; 0 if it is too short."""
        return max(0, functools.reduce(_after, self.convs, length))


def _after(length: Any, conv: tuple[int, int, int]) -> Any:
    """Returns the steps of an unpadded convolution of `length`, an integer or array; at most 0 if it is too short."""
    _, kernel, stride = conv
    return (length - kernel) // stride + 1


_KEYS = {
    "model_type": "model_type",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "conv_bias": "conv_bias",
    "conv_activation": "feat_extract_activation",
    "position_groups": "num_conv_pos_embedding_groups",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
_COMMON = {
    "conv_bias": False,
    "feat_extract_activation": "gelu",
    "num_conv_pos_embedding_groups": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
# Of transformers' configuration classes; config.json may omit values equal to them.
_DEFAULTS = {
    "wav2vec2": _COMMON | {"feat_extract_norm": "group", "num_conv_pos_embeddings": 128, "do_stable_layer_norm": False},
    "data2vec-audio": _COMMON | {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19},
}
# num_conv_pos_embeddings is the kernel of the only convolution in wav2vec 2.0, the number of convolutions in data2vec.
_VARIANTS = {
    "wav2vec2": lambda config: {
        "conv_norm": config["feat_extract_norm"],
        "positions": (config["num_conv_pos_embeddings"],),
        "stable": config["do_stable_layer_norm"],
    },
    "data2vec-audio": lambda config: {
        "conv_norm": "layer",
        "positions": (config["conv_pos_kernel_size"],) * config["num_conv_pos_embeddings"],
        "stable": False,
    },
}


def _convs(config: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    keys = {"width": "conv_dim", "kernel": "conv_kernel", "stride": "conv_stride"}
    columns = base.read(config, keys).values()
    if len({len(column) for column in columns}) != 1:
        raise AvjaxError(f"config.json: {', '.join(keys.values())} differ in length, expected one value a convolution")
    return tuple(zip(*columns, strict=True))


class RowNorm(nn.Module):
    """Normalises each channel over the real steps of its row, regardless of padding, followed by an affine map.

    This is group normalisation (Wu & He 2018) with one group a channel. Statistics are in float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Normalises x (b, s, d) with mask (b, s) to (b, s, d) in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        count = jnp.maximum(jnp.sum(mask, 1), 1)[:, None, None]

        def mean(values: jax.Array) -> jax.Array:
            # A sum rather than a product with the mask: accelerators round the operands of products.
            return jnp.sum(jnp.where(mask[..., None], values, 0), 1, keepdims=True) / count  # b 1 d

        x = x.astype(jnp.float32)
        x -= mean(x)
        factor = scale[None, None] * jax.lax.rsqrt(mean(x**2) + _EPS)
        return (x * factor + bias[None, None]).astype(self.dtype)


class Wav2Vec2(nn.Module):
    """The encoder without quantiser and heads. Params are float32; `dtype` is the dtype of products.

    `layer` is the number of blocks to compute; None: all. With `remat`, gradients recompute activations within blocks
    to save memory.
    """

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, waves: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps waves (b, n) at 16 kHz with mask (b, n) bool, real samples first, to hidden states and their mask.

        Returns:
          features (b, s, d) in `dtype` and mask (b, s), where s is `config.steps(n)`. A row has as many real steps as
          without the other rows.
        """
        c = self.config
        depth = base.block_count(self.layer, c.layers)
        steps, lengths = c.steps(waves.shape[1]), jnp.sum(mask, 1)
        waves = jnp.pad(jnp.where(mask, waves, 0), [(0, 0), (0, max(0, c.least - waves.shape[1]))])
        x, mask = self._convolve(waves, lengths)
        x = Project((c.width,), dtype=self.dtype, name="project")(self._norm(c.eps, name="feature_norm")(x))
        x = jnp.where(mask[..., None], x, 0)
        x += self._positions(x, mask)
        if not c.stable:
            x = self._norm(c.eps, name="position_norm")(x)
        block = PreNormBlock if c.stable else PostNormBlock
        block = nn.remat(block) if self.remat else block
        for i in range(depth):
            activation = base.activation(c.activation)
            x = block(c.heads, c.inner, activation, c.eps, self.dtype, name=f"block_{i}")(x, mask)
        if c.stable and depth == c.layers:
            x = self._norm(c.eps, name="norm")(x)
        return x[:, :steps], mask[:, :steps]

    def _convolve(self, waves: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the front end: waves (b, n) with `lengths` (b) real samples → features (b, s, d) and mask (b, s)."""
        c = self.config
        x = waves[..., None].astype(self.dtype)
        for i, (width, kernel, stride) in enumerate(c.convs):
            conv = nn.Conv(width, (kernel,), stride, "VALID", use_bias=c.conv_bias, dtype=self.dtype, name=f"conv_{i}")
            x, lengths = conv(x), _after(lengths, c.convs[i])
            # Convolutions read no padding in real steps, so only statistics over time need a mask.
            mask = jnp.arange(x.shape[1])[None] < lengths[:, None]
            if c.conv_norm == "layer":
                x = self._norm(_EPS, name=f"conv_norm_{i}")(x)
            elif i == 0:
                x = RowNorm(self.dtype, name=f"conv_norm_{i}")(x, mask)
            x = base.activation(c.conv_activation)(x)
        return x, mask

    def _positions(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes the positional embeddings of x (b, s, d): convolutions over it that keep its length."""
        c = self.config
        for i, kernel in enumerate(c.positions):
            x = jnp.where(mask[..., None], x, 0)
            ends = [(kernel // 2, (kernel - 1) // 2)]  # an even kernel reaches one step further back than ahead
            groups = c.position_groups
            name = f"position_{i}"
            x = nn.Conv(c.width, (kernel,), 1, ends, feature_group_count=groups, dtype=self.dtype, name=name)(x)
            if c.model_type == "data2vec-audio":
                x = self._norm(_EPS, use_bias=False, use_scale=False)(x)
            x = base.activation(c.conv_activation)(x)
        return x

    def _norm(self, eps: float, **options: Any) -> nn.LayerNorm:
        return nn.LayerNorm(eps, self.dtype, use_fast_variance=False, **options)


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Wav2Vec2:
    """Builds the module from the contents of a hub config.json."""
    return Wav2Vec2(Wav2Vec2Config.from_hub(config), dtype, layer)


def shapes(config: Wav2Vec2Config) -> dict[str, Any]:
    """Returns the shapes of the params of `Wav2Vec2(config)` without computing them."""
    return base.shapes(Wav2Vec2(config), ((1, config.least), jnp.float32), ((1, config.least), jnp.bool_))


_POSITION = "encoder.pos_conv_embed"
# Our paths without their index → PyTorch's names with it.
_NAMES = {
    "conv": "feature_extractor.conv_layers.{}.conv",
    "conv_norm": "feature_extractor.conv_layers.{}.layer_norm",
    "feature_norm": "feature_projection.layer_norm",
    "project": "feature_projection.projection",
    # One norm in two positions: before the blocks or, if these normalise before their branches, after them.
    "position_norm": "encoder.layer_norm",
    "norm": "encoder.layer_norm",
    "block/attention/query": "encoder.layers.{}.attention.q_proj",
    "block/attention/key": "encoder.layers.{}.attention.k_proj",
    "block/attention/value": "encoder.layers.{}.attention.v_proj",
    "block/attention/out": "encoder.layers.{}.attention.out_proj",
    "block/attention_norm": "encoder.layers.{}.layer_norm",
    "block/up": "encoder.layers.{}.feed_forward.intermediate_dense",
    "block/down": "encoder.layers.{}.feed_forward.output_dense",
    "block/norm": "encoder.layers.{}.final_layer_norm",
}
_POSITION_NAMES = {"wav2vec2": f"{_POSITION}.conv", "data2vec-audio": f"{_POSITION}.layers.{{}}.conv"}
_PREFIXES = {"wav2vec2": "wav2vec2.", "data2vec-audio": "data2vec_audio."}
# PyTorch's two names of the gain and the direction of a normalised weight.
_GAIN_AND_DIRECTION = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
# Heads of pretraining and fine-tuning, and the embedding of masked steps in training.
IGNORED = re.compile(
    r"^(quantizer|project_hid|project_q|lm_head|classifier|projector|tdnn|objective)\."
    r"|^(masked_spec_embed|layer_weights|feature_extractor\.weight|feature_extractor\.bias)$"
)


def convert(tensors: Mapping[str, np.ndarray], config: Wav2Vec2Config) -> dict[str, Any]:
    """Converts a PyTorch checkpoint, with or without its model's prefix, to the params of `Wav2Vec2(config)`.

    The positional convolution of wav2vec 2.0 is stored as gain and direction (weight normalisation, Salimans & Kingma
    2016); the params hold the resulting kernel.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
    """
    plain = {name.removeprefix(_PREFIXES[config.model_type]): tensor for name, tensor in tensors.items()}
    names = _NAMES | {"position": _POSITION_NAMES[config.model_type]}
    return weights.convert(_multiplied(plain), shapes(config), functools.partial(_torch_name, names), IGNORED)


def _multiplied(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Multiplies out gain and direction of the positional convolution: weight = g v / |v| for each tap."""
    tensors, conv = dict(tensors), f"{_POSITION}.conv"
    for gain, direction in _GAIN_AND_DIRECTION:
        if {f"{conv}.{gain}", f"{conv}.{direction}"} <= tensors.keys():
            g, v = (tensors.pop(f"{conv}.{part}").astype(np.float32) for part in (gain, direction))
            tensors[f"{conv}.weight"] = g * v / np.sqrt(np.sum(v**2, (0, 1), keepdims=True))
    return tensors


def _torch_name(names: Mapping[str, str], path: str) -> str:
    index = re.search(r"_(\d+)", path)
    return names[re.sub(r"_\d+", "", path)].format(index and index[1])


def prepare(raw: Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Prepares waveforms as transformers' Wav2Vec2FeatureExtractor does.

    Args:
      raw: mono clips at 16 kHz, each (samples,), of any lengths.
      settings: contents of preprocessor_config.json; `do_normalize` (default True) standardises each clip to zero mean
        and unit variance over its own samples.

    Returns:
      waves (b, n) float32, zero-padded, and mask (b, n) bool, where n is the length of the longest clip.

    Raises:
      AvjaxError: a clip is not of rank 1, or the settings ask for another sampling rate.
    """
    if (rate := settings.get("sampling_rate", RATE)) != RATE:
        raise AvjaxError(f"preprocessor_config.json: sampling_rate is {rate}, expected {RATE}")
    clips = [np.asarray(clip, np.float32) for clip in raw]
    if odd := [clip.shape for clip in clips if clip.ndim != 1]:
        raise AvjaxError(f"waveforms of shapes {odd}: expected (samples,), one channel each")
    if settings.get("do_normalize", True):
        clips = [_standardised(clip) if len(clip) else clip for clip in clips]
    return base.pad_rows(clips, np.float32(0))


def _standardised(clip: np.ndarray) -> np.ndarray:
    return (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
