"""The encoder of Whisper (Radford et al. 2023): log-mel spectra of speech → a vector every 20 ms.

The original pads all audio to 30 s; this encoder keeps its true length. Features of 30 s equal those of the original;
features of shorter audio equal those of the original built for that length, with the first rows of its positions.
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
from avjax.layers import PreNormBlock, Project

INPUTS = Inputs("log-mel spectra (batch, bins, frames)", rank=3, length_axis=2, prefix=True, least=64)

_SAMPLE_RATE = 16000  # Hz
_FFT, _HOP = 400, 160  # samples
_CENTRE = _FFT // 2  # samples of padding at both ends: frames are centred on multiples of the hop
# Settings of the preprocessor that `prepare` supports; other values are refused.
_FIXED = {"sampling_rate": _SAMPLE_RATE, "n_fft": _FFT, "hop_length": _HOP, "dither": 0.0, "do_normalize": False}
_EPS = 1e-5  # of layer normalisation; the original has no other


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Architecture of a checkpoint's encoder; widths are numbers of units."""

    bins: int  # mel bands
    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    positions: int  # the largest number of features
    activation: str  # of the feed-forward layers; the convolutions always have GELU

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "WhisperConfig":
        """Reads the contents of the hub's config.json.

        Raises:
          AvjaxError: a value is missing or not supported.
        """
        fields = base.read({"activation_function": "gelu"} | config, _KEYS)
        base.activation(fields["activation"])
        return cls(**fields)

    @property
    def longest(self) -> int:
        """Returns the longest input, in frames of 10 ms."""
        return 2 * self.positions

    def steps(self, length: int) -> int:
        """Returns the number of features of an input of `length` frames."""
        return (length + 1) // 2


_KEYS = {
    "bins": "num_mel_bins",
    "width": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "inner": "encoder_ffn_dim",
    "positions": "max_source_positions",
    "activation": "activation_function",
}


class Whisper(nn.Module):
    """The encoder without the decoder. Params are float32; `dtype` is the dtype of matrix products.

    `layer` is the number of blocks to compute; None: all. With `remat`, gradients recompute activations within blocks
    to save memory.
    """

    config: WhisperConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, spectra: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps log-mel spectra (b, bins, l) with mask (b, l) bool to hidden states (b, s, d) and their mask (b, s).

        s = (l + 1) // 2, and a row of n real frames has (n + 1) // 2 real steps. Padding may only follow real frames.
        Hidden states are in `dtype`.

        Raises:
          AvjaxError: l exceeds the longest input, or the number of bins is not the config's.
        """
        c = self.config
        if spectra.shape[1] != c.bins or spectra.shape[2] > c.longest:
            raise AvjaxError(f"spectra {spectra.shape}: expected (batch, {c.bins}, up to {c.longest} frames); cut them")
        x = jnp.where(mask[..., None], jnp.swapaxes(spectra, 1, 2), 0)  # b l bins
        x = self._convolved("conv1", _neighbours(x))
        # The first convolution adds its bias to the padding, which must be zero for the second.
        x = self._convolved("conv2", _neighbours_of_even(jnp.where(mask[..., None], x, 0)))  # b s d
        mask = mask[:, ::2]
        x += nn.Embed(c.positions, c.width, self.dtype, name="positions")(jnp.arange(x.shape[1]))[None]
        layers = base.block_count(self.layer, c.layers)
        block = nn.remat(PreNormBlock) if self.remat else PreNormBlock
        for i in range(layers):
            activation = base.activation(c.activation)
            x = block(c.heads, c.inner, activation, _EPS, self.dtype, ("key",), name=f"block_{i}")(x, mask)
        if layers == c.layers:
            x = nn.LayerNorm(_EPS, self.dtype, use_fast_variance=False, name="norm")(x)
        return x, mask

    def _convolved(self, name: str, windows: jax.Array) -> jax.Array:
        # One matrix product over the whole window: 1-d convolutions are slow on CPU.
        product = Project((self.config.width,), inputs=2, dtype=self.dtype, name=name)
        return nn.gelu(product(windows), approximate=False)


def _neighbours(x: jax.Array) -> jax.Array:
    """Stacks each step of x (b, l, d) with its two neighbours, zeros beyond the ends: (b, l, 3, d)."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.stack([padded[:, :-2], x, padded[:, 2:]], 2)


def _neighbours_of_even(x: jax.Array) -> jax.Array:
    """Returns the even steps of `_neighbours(x)`: (b, (l + 1) // 2, 3, d)."""
    batch, length, width = x.shape
    pairs = jnp.pad(x, ((0, 0), (0, length % 2), (0, 0))).reshape(batch, -1, 2, width)  # even step, odd step
    before = jnp.pad(pairs[:, :, 1:], ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    return jnp.concatenate([before, pairs], 2)


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Whisper:
    """Builds the module from the contents of a hub config.json."""
    return Whisper(WhisperConfig.from_hub(config), dtype, layer)


def shapes(config: WhisperConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `Whisper(config)` without computing them."""
    return base.shapes(Whisper(config), ((1, config.bins, 2), jnp.float32), ((1, 2), jnp.bool_))


_TOP = {"conv1": "conv1", "conv2": "conv2", "positions": "embed_positions", "norm": "layer_norm"}
_BLOCK = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
# The decoder, and the heads of transcription and of audio classification.
IGNORED = re.compile(r"^(decoder|proj_out|projector|classifier)\.|^layer_weights$")


def convert(tensors: Mapping[str, np.ndarray], config: WhisperConfig) -> dict[str, Any]:
    """Converts a PyTorch checkpoint, with or without its model's prefix, to the params of `Whisper(config)`.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
    """
    plain = {name.removeprefix("model.").removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    name_of = functools.partial(base.torch_name, top=_TOP, layers="layers", block=_BLOCK)
    return weights.convert(plain, shapes(config), name_of, IGNORED)


def prepare(raw: Sequence[np.ndarray], settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Computes log-mel spectra of audio at its true length, as transformers' WhisperFeatureExtractor does for one clip.

    Args:
      raw: mono waveforms, each (samples,), at 16 kHz. They are cut to the preprocessor's `chunk_length` (30 s), and
        padded with zeros to 400 samples, the window of one frame; an empty waveform has no frame.
      settings: contents of preprocessor_config.json; {}: the defaults of the original.

    Returns:
      spectra (batch, bins, frames) float32, a frame every 10 ms, zero-padded, and mask (batch, frames).

    Raises:
      AvjaxError: a waveform is not mono, or the settings ask for something unsupported.
    """
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise AvjaxError(f"preprocessor_config.json: {key} is {settings[key]}, but only {value} is supported")
    bins = settings.get("feature_size", 80)
    longest = settings.get("chunk_length", 30) * _SAMPLE_RATE
    return base.pad_rows([_log_mel(waveform[:longest], bins) for waveform in raw], np.float32(0), (bins,))


def _log_mel(waveform: np.ndarray, bins: int) -> np.ndarray:
    """Computes the log-mel spectrum (bins, samples // 160) of a waveform (samples,)."""
    if waveform.ndim != 1:
        raise AvjaxError(f"a waveform has shape {waveform.shape}, expected mono audio (samples,) at 16 kHz")
    if not waveform.size:
        return np.zeros((bins, 0))
    filled = np.pad(waveform.astype(np.float32), (0, max(0, _FFT - waveform.size)))
    centred = np.pad(filled, _CENTRE, mode="reflect")
    # The original drops the last frame, which is centred on the end of the waveform.
    frames = np.lib.stride_tricks.sliding_window_view(centred, _FFT)[: filled.size // _HOP * _HOP : _HOP]
    window = np.hanning(_FFT + 1)[:-1]  # periodic; float64, like everything below
    power = np.square(np.abs(np.fft.rfft(frames * window)))
    log_mel = np.log10(np.maximum(_mel_filters(bins) @ power.T, 1e-10))
    return (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4


@functools.cache
def _mel_filters(bins: int) -> np.ndarray:
    """Returns the mel filters (bins, 201) of Slaney's Auditory Toolbox, 0 to 8 kHz."""
    import librosa

    return librosa.filters.mel(sr=_SAMPLE_RATE, n_fft=_FFT, n_mels=bins, dtype=np.float64)
