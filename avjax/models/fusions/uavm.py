"""UAVM: layers per stream, then layers that all streams share.

Gong et al. 2022, "UAVM: Towards Unifying Audio and Visual Models", IEEE Signal Processing Letters.
Shapes: b clip, n step of a stream, p position, s stream, d width, c class.

A missing stream is an all-False mask: it is left out of the fused prediction, and costs nothing. Without any stream
the logits are zeros.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import PreNormBlock, Project, align, masked_mean, pack
from avjax.models.base import Batch, Fusion, Output, head_loss, stream_heads
from avjax.models.fusions.base import FusionModule, has_stream


class PositionedTransformer(nn.Module):
    """Norm, projection if the width differs, learned positions, `depth` pre-norm layers."""

    width: int
    heads: int
    depth: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, p, w) under mask (b, p) to (b, p, width)."""
        x = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False, name="norm")(x)
        if x.shape[-1] != self.width:
            x = Project((self.width,), dtype=self.dtype, name="project")(x)
        x += self.param("positions", nn.initializers.truncated_normal(0.02), x.shape[1:]).astype(x.dtype)[None]
        gelu = functools.partial(nn.gelu, approximate=False)
        for i in range(self.depth):
            unbiased = ("query", "key", "value")
            x = PreNormBlock(self.heads, 4 * self.width, gelu, 1e-5, self.dtype, unbiased, name=f"block_{i}")(x, mask)
        return x


class Uavm(FusionModule):
    """UAVM (Gong et al. 2022): layers per stream, then layers that all streams share.

    The fused logits are the mean over the streams that a clip has, as in the paper. A stream is averaged over
    `positions` equal spans of the clip, which changes nothing if it has that many steps.

    Attributes:
      width, heads: of every layer; depth, shared_depth: number of layers per stream, and of shared ones.
      positions: p, the number of learned positions; the paper has 30 for clips of ten seconds.
    """

    streams: tuple[str, ...] = ("audio", "video")
    width: int = 1024
    heads: int = 4
    depth: int = 3
    shared_depth: int = 3
    positions: int = 30

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the head "fusion" and one per stream. `train` has no effect: the paper has no dropout."""
        encoder = functools.partial(PositionedTransformer, self.width, self.heads, dtype=self.dtype)
        shared, norm = (
            encoder(self.shared_depth, name="shared"),
            nn.LayerNorm(1e-6, use_fast_variance=False, name="head_norm"),
        )
        head = nn.Dense(self.classes, name="head")
        features, logits = {}, {}
        for s in self.streams:
            packed = pack(batch[s], batch[f"{s}_mask"])
            spans = align(*packed, jnp.ones((len(packed[1]), self.positions), bool))
            x = shared(encoder(self.depth, name=s)(*spans), spans[1])
            features[s] = norm(masked_mean(x.astype(jnp.float32), spans[1]))
            logits[s] = head(features[s])
        present = jnp.stack([has_stream(batch, s) for s in self.streams], -1)  # b s
        mean = lambda x: masked_mean(jnp.stack([x[s] for s in self.streams], 1), present)  # noqa: E731
        return Output({"fusion": mean(logits)} | logits, {"fusion": mean(features)} | features, {})


def uavm_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes the cross entropy of each stream, weighted evenly, as the paper's training samples streams evenly."""
    streams = [head for head in output.logits if head != "fusion"]
    return {s: head_loss(output, batch, s, task) / len(streams) for s in streams}


FUSIONS: dict[str, Fusion] = {
    "uavm": Fusion(
        module=Uavm,
        loss=uavm_loss,
        heads=stream_heads,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 144, "weight_decay": 5e-7, "epochs": 10},
        small={"width": 128, "depth": 1, "shared_depth": 1, "positions": 8},
        paper="Gong, Liu, Rouditchenko, Glass 2022, IEEE Signal Processing Letters",
    ),
}
