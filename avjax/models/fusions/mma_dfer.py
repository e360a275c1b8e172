"""MMA-DFER: streams exchange information in a narrow space after every layer, and one is modelled over time.

Chumachenko, Iosifidis, Gabbouj, "MMA-DFER: MultiModal Adaptation of unimodal models for Dynamic Facial Expression
Recognition in-the-wild", CVPR Workshops 2024. Shapes: b clip, n step of a stream, d width, c class.

Positions are sinusoids, counted from a clip's first real step. A missing modality is an all-False mask: it is not
attended to, and its own vector is zero. Without any modality only the class token predicts.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import CrossBlock, PreNormBlock, Project, masked_mean, positions, sinusoids, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class Bottleneck(nn.Module):
    """Fusion bottleneck (Chumachenko et al. 2024, section 3): streams meet in a narrow space, with gates.

    Each stream is mapped to `width` and normalised, and the other streams' averages over time are added to its steps.
    The sum is mapped back, multiplied by the tanh of a learned gate, and added to the stream. Gates start at 0, so that
    initially the block changes nothing.
    """

    width: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams) -> Streams:
        """Maps streams (b, n, d) with masks (b, n) to the same shapes."""
        narrow = {s: self._down(s, x) for s, x in steps.items()}
        means = {s: masked_mean(x, masks[s])[:, None] for s, x in narrow.items()}
        met = {s: sum([means[o] for o in steps if o != s], x) for s, x in narrow.items()}
        return {s: x + self._up(s, met[s], x.shape[-1]) for s, x in steps.items()}

    def _down(self, stream: str, x: jax.Array) -> jax.Array:
        x = Project((self.width,), dtype=self.dtype, name=f"down_{stream}")(x)
        return nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name=f"norm_{stream}")(x)

    def _up(self, stream: str, x: jax.Array, width: int) -> jax.Array:
        x = nn.gelu(Project((width,), dtype=self.dtype, name=f"up_{stream}")(x), approximate=False)
        gate = jnp.tanh(self.param(f"gate_{stream}", nn.initializers.zeros, (1,)))
        return x * gate.astype(x.dtype)[None, None]


class MmaDfer(FusionModule):
    """MMA-DFER (Chumachenko et al. 2024) on features: one transformer per stream, a `Bottleneck` after every layer.

    The last stream is modelled over time: the vectors of the others are added to its steps and to a class token, and
    the token's output of one more layer goes to the head. Unlike the paper, the vectors are also added to the token, so
    that a clip without video is still classified by its audio.

    The paper has twelve pretrained, frozen layers, adapted by prompts. On features there is nothing to freeze or to
    prompt: these layers are few and trained. The mean over real steps replaces the class tokens of the encoders.
    `train` has no effect, as in the released temporal layer.

    Attributes:
      streams: any of text, audio, video; the last one is modelled over time.
      width, heads, inner: of every layer, as in the paper's temporal one; heads divides width.
      layers: of each stream; bottleneck: width of the shared space.
    """

    streams: tuple[str, ...] = ("audio", "video")
    width: int = 512
    heads: int = 8
    inner: int = 1024
    layers: int = 2
    bottleneck: int = 128

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; features also hold their vectors."""
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        steps = {s: self._embed(s, x, masks[s]) for s, x in steps.items()}
        gelu = functools.partial(nn.gelu, approximate=False)
        for i in range(self.layers):
            layer = functools.partial(PreNormBlock, self.heads, self.inner, gelu, 1e-6, self.dtype)
            steps = {s: layer(name=f"{s}_{i}")(x, masks[s]) for s, x in steps.items()}
            steps = Bottleneck(self.bottleneck, self.dtype, name=f"bottleneck_{i}")(steps, masks)
        norm = functools.partial(nn.LayerNorm, 1e-6, self.dtype, use_fast_variance=False)
        steps = {s: norm(name=f"norm_{s}")(x) for s, x in steps.items()}
        vectors = {s: masked_mean(x, masks[s]) for s, x in steps.items()}
        *others, last = self.streams
        fused = self._over_time(steps[last], masks[last], [vectors[s] for s in others]).astype(jnp.float32)
        return self.predict(fused, vectors)

    def _embed(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Project((self.width,), dtype=self.dtype, name=f"project_{stream}")(x)
        return x + sinusoids(positions(mask), self.width).astype(x.dtype)

    def _over_time(self, x: jax.Array, mask: jax.Array, others: list[jax.Array]) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) and others (b, d) each to the output of the class token (b, d)."""
        token = self.param("class_token", nn.initializers.normal(0.02), (self.width,)).astype(x.dtype)
        token = jnp.broadcast_to(token[None, None], (len(x), 1, self.width))
        x = sum([v[:, None] for v in others], jnp.concatenate([token, x], 1))
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        block = CrossBlock(self.heads, self.inner, nn.gelu, dtype=self.dtype, name="temporal")
        return block(x[:, :1], x, mask)[:, 0]


FUSIONS: dict[str, Fusion] = {
    "mma_dfer": Fusion(
        module=MmaDfer,
        small={"width": 128, "inner": 256, "bottleneck": 32},
        recipe={"learning_rate": 1e-4, "batch_size": 8, "weight_decay": 1e-2, "epochs": 25},
        paper="Chumachenko, Iosifidis, Gabbouj 2024, CVPR Workshops",
    ),
}
