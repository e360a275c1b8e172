"""VAVL: Conformers per stream, then one that all streams share.

Goncalves et al. 2023, "Versatile audio-visual learning for emotion recognition".
Shapes: b clip, n step of a stream, d width, c class.

A missing stream is an all-False mask: it enters the fused prediction as zeros, and costs nothing. Without any stream
only biases predict.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import ConformerBlock, Dropout, Project, masked_mean, pack
from avjax.models.base import Batch, Fusion, Output, head_loss, stream_heads
from avjax.models.fusions.base import FusionModule, has_stream


class Perceptron(nn.Module):
    """VAVL's heads: width → `hidden[0]`, ReLU, dropout → `hidden[1]` → `outputs`; float32."""

    outputs: int
    hidden: tuple[int, int]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (b, d) to (b, outputs)."""
        x = nn.relu(nn.Dense(self.hidden[0])(x))
        x = Dropout(self.dropout, train)(x)
        return nn.Dense(self.outputs)(nn.Dense(self.hidden[1])(x))


class Vavl(FusionModule):
    """VAVL (Goncalves et al. 2023): Conformers per stream, then a shared one with a residual around it.

    Each stream has a head and reconstructs the mean of its input; the fused head reads the concatenated streams without
    a gradient into them. The released code passes batches with steps first to a block that expects clips first, so that
    clips attend to each other; this one attends within a clip only, with Transformer-XL's positions.

    Attributes:
      bottleneck: width of the first, unbiased map of a stream; width, heads, kernel: of the Conformers.
      depth, shared_depth: number of Conformer blocks per stream, and of shared ones.
      dropout: rate in the blocks; head_dropout: rate in the heads; both in training only.
    """

    streams: tuple[str, ...] = ("audio", "video")
    bottleneck: int = 50
    width: int = 512
    heads: int = 8
    kernel: int = 31
    depth: int = 3
    shared_depth: int = 2
    dropout: float = 0.1
    head_dropout: float = 0.1

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the head "fusion" and one per stream; features also hold "<stream>_rebuilt" (b, w)."""
        norm = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")
        shared = self._blocks("shared", self.shared_depth)
        features, rebuilt, logits = {}, {}, {}
        for s in self.streams:
            x, mask = pack(batch[s], batch[f"{s}_mask"])
            own = self._encode(s, x, mask, train)
            x = _through(shared, own, mask, train) + own
            features[s] = masked_mean(norm(x.astype(jnp.float32)), mask)
            logits[s] = self._head(f"head_{s}", self.classes)(features[s], train)
            rebuilt[f"{s}_rebuilt"] = self._head(f"rebuild_{s}", batch[s].shape[-1])(features[s], train)
        joined = jax.lax.stop_gradient(jnp.concatenate([features[s] for s in self.streams], -1))
        fused = self._head("head_fusion", self.classes)(joined, train)
        return Output({"fusion": fused} | logits, {"fusion": joined} | features | rebuilt, {})

    def _encode(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        x = Project((self.bottleneck,), dtype=self.dtype, bias=False, name=f"{stream}_bottleneck")(x)
        x = Project((self.width,), dtype=self.dtype, name=f"{stream}_project")(x)
        x = Dropout(self.dropout, train)(x)
        return _through(self._blocks(stream, self.depth), x, mask, train)

    def _blocks(self, name: str, depth: int) -> list[ConformerBlock]:
        block = functools.partial(
            ConformerBlock, heads=self.heads, kernel=self.kernel, dropout=self.dropout, dtype=self.dtype
        )
        return [block(name=f"{name}_{i}") for i in range(depth)]

    def _head(self, name: str, outputs: int) -> Perceptron:
        return Perceptron(outputs, (self.width, self.width // 2), self.head_dropout, name=name)


def _through(blocks: list[ConformerBlock], x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    for block in blocks:
        x = block(x, mask, train)
    return x


def vavl_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes the cross entropy of every head, and twice each stream's mean squared error (released code)."""
    terms = {head: head_loss(output, batch, head, task) for head in output.logits}
    for s in [head for head in output.logits if head != "fusion"]:
        target = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
        error = jnp.mean((output.features[f"{s}_rebuilt"] - target) ** 2, -1)
        terms[f"{s}_rebuilt"] = jnp.where(has_stream(batch, s), 2.0 * error, 0.0)
    return terms


FUSIONS: dict[str, Fusion] = {
    "vavl": Fusion(
        module=Vavl,
        loss=vavl_loss,
        small={"width": 128, "depth": 1, "shared_depth": 1},
        heads=stream_heads,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 32, "weight_decay": 5e-7, "epochs": 20},
        paper="Goncalves, Leem, Lin, Sisman, Busso 2023, Versatile audio-visual learning",
    ),
}
