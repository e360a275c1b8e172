"""M2FNet: transformers over the turns of a conversation, then fusion attention.

Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in Conversation", CVPRW 2022.
Shapes: b conversation, u turn, n step of a stream, d width, h head, c class; batches as `masking.turns` reads them.

A turn without a stream is masked in its attention, and its part of the concatenated vector is zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import Dropout, PreNormBlock, Project, attend, turns
from avjax.models.base import Batch, Fusion, Output, head_loss
from avjax.models.fusions.base import FusionModule, counted


class FusionAttention(nn.Module):
    """M2FNet's fusion attention (section 3.3.2): queries and values from the main stream, keys from another stream.

    The context is concatenated with the main stream and goes through a dense layer with ReLU.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, main: jax.Array, other: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps main (b, u, d) and other (b, u, d), whose turns under mask (b, u) have both, to (b, u, d)."""
        width = main.shape[-1]
        split = (self.heads, width // self.heads)
        query, key, value = (
            Project(split, dtype=self.dtype, name=name)(x)
            for name, x in (("query", main), ("key", other), ("value", main))
        )
        context, _ = attend(query, key, value, mask)
        attended = Project((width,), inputs=2, dtype=self.dtype, name="out")(context)
        joined = jnp.concatenate([attended, main], -1)
        return jax.nn.relu(Project((width,), dtype=self.dtype, name="join")(joined))


class M2FNet(FusionModule):
    """M2FNet (Chudasama et al. 2022): a transformer over turns per stream, then layers of fusion attention.

    The main stream, the text in the paper, is the first of `streams`.

    Attributes:
      streams: any of text, audio, video, the main one first.
      width: d; heads: divides it.
      layers: of each stream's transformer, which has a residual around it; fusion_layers: of fusion attention.
      dropout: rate on the streams' turns and before the head.
    """

    width: int = 256
    heads: int = 4
    layers: int = 2
    fusion_layers: int = 2
    dropout: float = 0.4

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes the logits (b, u, c) of the head "fusion"; features hold each stream's turns (b, u, d)."""
        drop = Dropout(self.dropout, train)
        means, present = turns(batch, self.streams, self.dtype)
        alone = {s: self._stream(s, drop(means[s]), present[s]) for s in self.streams}
        main = alone[self.streams[0]]
        for i in range(self.fusion_layers):
            for s in self.streams[1:]:
                both = present[self.streams[0]] & present[s]
                fused = FusionAttention(self.heads, self.dtype, name=f"fuse_{i}_{s}")(main, alone[s], both)
                main = jnp.where(both[..., None], fused, main)
        joined = jnp.concatenate([main, *(alone[s] for s in self.streams[1:])], -1)
        fused = drop(jax.nn.relu(Project((self.width,), dtype=self.dtype, name="join")(joined)))
        return self.predict(fused, alone)

    def _stream(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Project((self.width,), dtype=self.dtype, name=f"project_{stream}")(x)
        initial = x
        for i in range(self.layers):
            x = PreNormBlock(self.heads, 2 * self.width, jax.nn.relu, 1e-5, self.dtype, name=f"{stream}_{i}")(x, mask)
        return jnp.where(mask[..., None], initial + x, 0)


def adaptive_triplet(x: jax.Array, label: jax.Array, counts: jax.Array) -> jax.Array:
    """Computes a triplet loss with an adaptive margin (Chudasama et al. 2022, section 3.2, our reading).

    Vectors are scaled to length 1. Each anchor is compared with the farthest vector of its class and the nearest one of
    another, at distances p and q; margin = 2 + 2 / (exp(4 p) + ε) + 2 / (exp(4 − 4 q) + ε), ε = 1e-5, without a
    gradient through it.

    Args:
      x: (n, d).
      label: (n,).
      counts: (n,) bool, which vectors are used.

    Returns:
      (n,) float32, 0 for an anchor that lacks either.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
    distance = jnp.sqrt(jnp.maximum(2 - 2 * x @ x.T, 1e-6))
    alike = label[:, None] == label[None]
    pairs = counts[:, None] & counts[None]
    positives, negatives = pairs & alike & ~jnp.eye(len(x), dtype=bool), pairs & ~alike
    far = jnp.max(jnp.where(positives, distance, 0), -1)
    near = jnp.min(jnp.where(negatives, distance, 4), -1)
    margin = jax.lax.stop_gradient(2 + 2 / (jnp.exp(4 * far) + 1e-5) + 2 / (jnp.exp(4 - 4 * near) + 1e-5))
    both = jnp.any(positives, -1) & jnp.any(negatives, -1)
    return jnp.where(both, jnp.maximum(far - near + margin, 0), 0)


def m2fnet_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes the cross entropy, and 0.05 times each stream's `adaptive_triplet` over the scored turns of the batch.

    The paper trains its audio and video extractors separately by the triplet loss; as features are given, it trains the
    streams' transformers instead. A clip's loss depends on its batch, its prediction does not.

    Raises:
      AvjaxError: labels are not classes.
    """
    if task != "single":
        raise AvjaxError(f"m2fnet's triplets compare classes; the task is {task!r}: take another model")
    label = batch["label"]
    terms = {"fusion": head_loss(output, batch, "fusion", task)}
    for s in [name for name in output.features if name != "fusion"]:
        counts, x = counted(batch, s), output.features[s]
        triplets = adaptive_triplet(x.reshape(-1, x.shape[-1]), label.reshape(-1), counts.reshape(-1))
        terms[f"{s}_triplet"] = 0.05 * triplets.reshape(label.shape)
    return terms


FUSIONS: dict[str, Fusion] = {
    "m2fnet": Fusion(
        module=M2FNet,
        paper="Chudasama et al. 2022, CVPR workshops",
        loss=m2fnet_loss,
        turns=True,
        recipe={"learning_rate": 5e-4, "batch_size": 8},
    ),
}
