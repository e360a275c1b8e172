"""Fusions that look at neighbouring steps first: CFN-SR and C3D with an LSTM.

CFN-SR: Fu et al., "A cross-modal fusion network based on self-attention and residual structure for multimodal emotion
recognition", 2021.
C3D: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks", ICCV 2015; with an LSTM over time a
baseline of Liu et al., "MAFW: A Large-scale, Multi-modal, Compound Affective Database", ACM MM 2022.
Shapes: b clip, n step of a stream, t frame, h row, w column, d width, c class.

Every convolution reads zeros where a step is masked, as it does beyond the ends of a clip, and none shortens time: so
padding changes nothing, and masks stay those of the batch. A missing modality is an all-False mask, its vector zero;
without any the answer is the head's bias.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project, TimeConvolution
from avjax.layers.lstm import Recurrence
from avjax.layers.masking import enter, last_step, masked_mean, masked_softmax
from avjax.models.base import Fusion, Output
from avjax.models.fusions.crossmodal import Encoder

Batch = Mapping[str, jax.Array]


def silence(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros where `mask` (b, n) is False: (b, n, ...) → the same shape."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0)


# ---- CFN-SR -------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions over time with norms, and around them the input itself, mapped where its width differs.

    The papers' blocks have batch norms, which make clips depend on each other; here every step is normalised by itself.
    """

    width: int
    kernel: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, width)."""
        hidden = nn.relu(self._convolve("first", x, mask))
        hidden = self._convolve("second", hidden, mask)
        if x.shape[-1] != self.width:
            x = Project((self.width,), dtype=self.dtype, name="shortcut")(x)
        return nn.relu(x + hidden)

    def _convolve(self, name: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = TimeConvolution(self.width, self.kernel, dtype=self.dtype, name=name)(silence(x, mask))
        return nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name=f"{name}_norm")(x)


class CrossModalBlock(nn.Module):
    """Cross-modal block of CFN-SR: what one stream says decides how much each step of another weighs.

    The weights are a softmax, over the real steps of a clip, of an additive score; times the number of steps they
    multiply the steps, which are added to themselves so weighted (residual). The released code sums the weights over
    the clips of a batch, so that clips change each other's answers, and has no factor, so that the other stream would
    count for less the longer a clip is.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, said: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (b, n, d) under mask (b, n), said (b, d) → the same, reweighed, and the weights (b, n)."""
        project = functools.partial(Project, x.shape[-1:], dtype=self.dtype)
        hidden = project(name="steps")(x) + project(bias=False, name="said")(said)[:, None]
        scores = Project((1,), dtype=self.dtype, name="score")(jnp.tanh(hidden))[..., 0]
        weights = masked_softmax(scores.astype(jnp.float32), mask)
        factor = 1 + weights * jnp.sum(mask, -1, keepdims=True)
        return x * factor[..., None].astype(x.dtype), weights


class CfnSr(nn.Module):
    """CFN-SR (Fu et al. 2021) on feature sequences: the first stream tells the others which of their steps count.

    All streams go through `ResidualBlock`s. The last step of a causal transformer over the first stream reweighs each
    other one (`CrossModalBlock`). The average of the first stream as it was is joined with those of the others as they
    became. In the paper the blocks of the pictures are a 3-d ResNeXt, and those of the sound a small convolutional
    network for one length of clip, whose steps are joined; an average takes any length.

    A clip without the first stream is reweighed by its own steps alone.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video; the first one tells the others.
      width: d, the paper's for sound; blocks, kernel: of the convolutions.
      layers, heads: of the transformer; heads divides width.
      dropout: rate on its weights and residual branches; embedding_dropout: on what enters it; out_dropout: on the
        average of the first stream.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    width: int = 64
    blocks: int = 2
    kernel: int = 5
    layers: int = 5
    heads: int = 8
    dropout: float = 0.1
    embedding_dropout: float = 0.3
    out_dropout: float = 0.4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold each stream's vector; attention the weights (b, n) of all streams but the first.
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        steps = {s: self._convolve(s, x, masks[s]) for s, x in steps.items()}
        first, *others = self.streams
        said = self._said(steps[first], masks[first], train) if others else None
        attention = {}
        for s in others:
            steps[s], attention[s] = CrossModalBlock(self.dtype, name=f"{first}_tells_{s}")(steps[s], masks[s], said)
        vectors = {s: masked_mean(steps[s].astype(jnp.float32), masks[s]) for s in self.streams}
        vectors[first] = Dropout(self.out_dropout, train)(vectors[first])
        fused = jnp.concatenate(list(vectors.values()), -1)
        return Output({"fusion": nn.Dense(self.classes, name="head")(fused)}, {"fusion": fused} | vectors, attention)

    def _convolve(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = ResidualBlock(self.width, self.kernel, self.dtype, name=f"{stream}_{i}")(x, mask)
        return x

    def _said(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        encoder = Encoder(
            self.layers, self.heads, dropout=self.dropout, attention_dropout=self.dropout,
            embedding_dropout=self.embedding_dropout, dtype=self.dtype, name="memory",
        )  # fmt: skip
        return last_step(encoder(x, mask, train=train), mask)


# ---- C3D and LSTM -------------------------------------------------------------------------------------------------


class Stages(nn.Module):
    """Convolutions over 3 along every axis, each followed by ReLU and the maximum of 2 x 2 pixels; then their mean.

    On pictures these are 3-d convolutions; C3D also halves time, where frames would meet padding. On feature sequences
    they are 1-d ones over time, without any maximum.
    """

    widths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, t, h, w, d) or (b, t, d) under mask (b, t) to (b, t, widths[-1])."""
        space = x.ndim - 3
        keeps_scale = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        for i, width in enumerate(self.widths):
            x, named = silence(x, mask), {"dtype": self.dtype, "name": f"stage_{i}"}
            if space:
                x = nn.relu(nn.Conv(width, (3, 3, 3), kernel_init=keeps_scale, **named)(x))
                x = nn.max_pool(x, (1, 2, 2), (1, 2, 2), "SAME")
            else:
                x = nn.relu(TimeConvolution(width, 3, kernel_init=keeps_scale, **named)(x))
        return jnp.mean(x, tuple(range(2, 2 + space)))


class C3dLstm(nn.Module):
    """C3D and an LSTM over its frames, joined late with an LSTM of every other stream.

    The video stream is pictures (b, t, h, w, 3) with values 0 to 255, or a feature sequence (b, t, w), on which the
    model trains as well (`Stages`). Every other stream is a feature sequence.

    Attributes:
      classes: number of classes c.
      streams: video and any others.
      widths: of the five convolutions; C3D's, four times as wide, belong to pretraining on a million clips.
      hidden: width of the LSTMs.
      dropout: rate on the joined states.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    widths: tuple[int, ...] = (16, 32, 64, 128, 128)
    hidden: int = 128
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream>` and `<stream>_mask (b, n)` of its streams; features hold each LSTM's last state (b, hidden).

        Raises:
          AvjaxError: the video stream is neither pictures nor a feature sequence.
        """
        steps = {s: self._frames(batch) if s == "video" else batch[s].astype(self.dtype) for s in self.streams}
        vectors = {s: self._last_state(s, x, batch[f"{s}_mask"]) for s, x in steps.items()}
        joined = jnp.concatenate(list(vectors.values()), -1)
        fused = Dropout(self.dropout, train)(joined)
        return Output({"fusion": nn.Dense(self.classes, name="head")(fused)}, {"fusion": fused} | vectors, {})

    def _frames(self, batch: Batch) -> jax.Array:
        x = batch["video"].astype(self.dtype)
        if x.ndim not in (3, 5):
            raise AvjaxError(
                f"the video stream has shape {x.shape}; C3D and LSTM read pictures (clip, frame, row, column, 3) or "
                "feature sequences (clip, frame, width): give one of them"
            )
        if x.ndim == 5:
            x = x / 127.5 - 1
        return Stages(self.widths, self.dtype, name="stages")(x, batch["video_mask"])

    def _last_state(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = Recurrence(self.hidden, dtype=self.dtype, name=f"{stream}_lstm")(x, mask)
        return hidden[:, -1]


FUSIONS: dict[str, Fusion] = {
    "cfn_sr": Fusion(
        module=CfnSr,
        small={"blocks": 1, "layers": 2},
        # The released code's defaults.
        recipe={"learning_rate": 1e-3, "batch_size": 16, "epochs": 70},
        paper="Fu et al. 2021, A cross-modal fusion network (CFN-SR)",
    ),
    "c3d_lstm": Fusion(
        module=C3dLstm,
        needs=("video",),
        paper="Tran et al. 2015, ICCV; Liu et al. 2022, ACM MM",
    ),
}
