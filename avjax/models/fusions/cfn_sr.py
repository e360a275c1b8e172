"""CFN-SR: what one stream says decides how much each step of another weighs.

Fu et al., "A cross-modal fusion network based on self-attention and residual structure for multimodal emotion
recognition", 2021. Shapes: b clip, n step of a stream, d width, c class.

Every convolution reads zeros where a step is masked, as it does beyond the ends of a clip, and none shortens time: so
padding changes nothing, and masks stay those of the batch. A missing modality is an all-False mask, its vector zero;
without any the answer is the head's bias.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import (
    CrossmodalEncoder,
    Dropout,
    Project,
    TimeConvolution,
    last_step,
    masked_mean,
    masked_softmax,
    stream_inputs,
    zero_masked,
)
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule


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
        x = TimeConvolution(self.width, self.kernel, dtype=self.dtype, name=name)(zero_masked(x, mask))
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


class CfnSr(FusionModule):
    """CFN-SR (Fu et al. 2021) on feature sequences: the first stream tells the others which of their steps count.

    All streams go through `ResidualBlock`s. The last step of a causal transformer over the first stream reweighs each
    other one (`CrossModalBlock`). The average of the first stream as it was is joined with those of the others as they
    became. In the paper the blocks of the pictures are a 3-d ResNeXt, and those of the sound a small convolutional
    network for one length of clip, whose steps are joined; an average takes any length.

    A clip without the first stream is reweighed by its own steps alone.

    Attributes:
      streams: any of text, audio, video; the first one tells the others.
      width: d, the paper's for sound; blocks, kernel: of the convolutions.
      layers, heads: of the transformer; heads divides width.
      dropout: rate on its weights and residual branches; embedding_dropout: on what enters it; out_dropout: on the
        average of the first stream.
    """

    streams: tuple[str, ...] = ("audio", "video")
    width: int = 64
    blocks: int = 2
    kernel: int = 5
    layers: int = 5
    heads: int = 8
    dropout: float = 0.1
    embedding_dropout: float = 0.3
    out_dropout: float = 0.4

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold each stream's vector; attention the weights (b, n) of all streams but the first.
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        steps = {s: self._convolve(s, x, masks[s]) for s, x in steps.items()}
        first, *others = self.streams
        said = self._said(steps[first], masks[first], train) if others else None
        attention = {}
        for s in others:
            steps[s], attention[s] = CrossModalBlock(self.dtype, name=f"{first}_tells_{s}")(steps[s], masks[s], said)
        vectors = {s: masked_mean(steps[s].astype(jnp.float32), masks[s]) for s in self.streams}
        vectors[first] = Dropout(self.out_dropout, train)(vectors[first])
        fused = jnp.concatenate(list(vectors.values()), -1)
        return self.predict(fused, vectors, attention)

    def _convolve(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = ResidualBlock(self.width, self.kernel, self.dtype, name=f"{stream}_{i}")(x, mask)
        return x

    def _said(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        encoder = CrossmodalEncoder(
            self.layers, self.heads, dropout=self.dropout, attention_dropout=self.dropout,
            embedding_dropout=self.embedding_dropout, dtype=self.dtype, name="memory",
        )  # fmt: skip
        return last_step(encoder(x, mask, train=train), mask)


FUSIONS: dict[str, Fusion] = {
    "cfn_sr": Fusion(
        module=CfnSr,
        small={"blocks": 1, "layers": 2},
        # The released code's defaults.
        recipe={"learning_rate": 1e-3, "batch_size": 16, "epochs": 70},
        paper="Fu et al. 2021, A cross-modal fusion network (CFN-SR)",
    ),
}
