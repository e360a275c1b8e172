"""CFN-SR: the content of one stream determines the weight of each step of another.

Fu et al., "A cross-modal fusion network based on self-attention and residual structure for multimodal emotion
recognition", 2021. Shapes: b clip, n step of a stream, d width, c class.

Every convolution reads zeros at masked steps, as beyond the ends of a clip, and keeps the number of steps, so padding
changes nothing and masks stay those of the batch. A missing modality is an all-False mask, its vector zero; without any
the prediction is the head's bias.
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
    """Two convolutions over time with norms and a residual, which is projected if the width changes.

    The paper's blocks have batch norms, which make clips depend on each other; this one has layer norms.
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
    """Cross-modal block of CFN-SR: the content of one stream determines the weight of each step of another.

    The weights are a softmax of additive scores over the real steps of a clip. The steps, multiplied by their weights
    and by the number of steps, are added to themselves (residual). The released code sums the weights over the clips of
    a batch, so that clips change each other's predictions, and lacks the number of steps, so that the other stream
    matters less in longer clips.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, content: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, n, d) under mask (b, n) and content (b, d) to x reweighted and its weights (b, n)."""
        project = functools.partial(Project, x.shape[-1:], dtype=self.dtype)
        hidden = project(name="steps")(x) + project(bias=False, name="said")(content)[:, None]
        scores = Project((1,), dtype=self.dtype, name="score")(jnp.tanh(hidden))[..., 0]
        weights = masked_softmax(scores.astype(jnp.float32), mask)
        factor = 1 + weights * jnp.sum(mask, -1, keepdims=True)
        return x * factor[..., None].astype(x.dtype), weights


class CfnSr(FusionModule):
    """CFN-SR (Fu et al. 2021) on feature sequences: the first stream weights the steps of the others.

    All streams go through `ResidualBlock`s. The last step of a causal transformer over the first stream reweights each
    other one (`CrossModalBlock`). The average of the original first stream is concatenated with those of the reweighted
    others. In the paper the blocks are a 3-d ResNeXt for video, and for audio a small convolutional network for a fixed
    clip length, whose steps are concatenated; averages allow any length.

    Without the first stream, a clip's steps are reweighted by themselves alone.

    Attributes:
      streams: any of text, audio, video; the first one weights the others.
      width: d, the paper's for audio; blocks, kernel: of the convolutions.
      layers, heads: of the transformer; heads divides width.
      dropout: rate on its weights and residual branches; embedding_dropout: on its input; out_dropout: on the
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
        content = self._content(steps[first], masks[first], train) if others else None
        attention = {}
        for s in others:
            steps[s], attention[s] = CrossModalBlock(self.dtype, name=f"{first}_tells_{s}")(steps[s], masks[s], content)
        vectors = {s: masked_mean(steps[s].astype(jnp.float32), masks[s]) for s in self.streams}
        vectors[first] = Dropout(self.out_dropout, train)(vectors[first])
        fused = jnp.concatenate(list(vectors.values()), -1)
        return self.predict(fused, vectors, attention)

    def _convolve(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = ResidualBlock(self.width, self.kernel, self.dtype, name=f"{stream}_{i}")(x, mask)
        return x

    def _content(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
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
