"""M2FNet: transformers over the turns of a conversation, then fusion attention.

Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in Conversation", CVPRW 2022.
Shapes: b conversation, u turn, n step of a stream, d width, h head, c class; batches as `masking.turns` reads them.

A turn that lacks a stream neither asks nor is asked in it, and its part of the joined vector is zero.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import Dropout, PreNormBlock, Project, attend, turns
from avjax.models.base import Batch, Fusion, Output, head_loss
from avjax.models.fusions.base import FusionModule, counted


class FusionAttention(nn.Module):
    """M2FNet's fusion attention (section 3.3.2): where turns of the main stream look is decided with another stream.

    The main stream asks, the other one is asked, and the main stream's own values answer; joined with the main stream,
    through a dense layer with ReLU.
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
        answer = Project((width,), inputs=2, dtype=self.dtype, name="out")(context)
        joined = jnp.concatenate([answer, main], -1)
        return jax.nn.relu(Project((width,), dtype=self.dtype, name="join")(joined))


class M2FNet(FusionModule):
    """M2FNet (Chudasama et al. 2022): a transformer over turns per stream, then layers of fusion attention.

    The main stream, the text in the paper, is the first of `streams`.

    Attributes:
      streams: any of text, audio, video, the main one first.
      width: d; heads: divides it.
      layers: of each stream's transformer, around which its input is added; fusion_layers: of fusion attention.
      dropout: rate on the streams' turns and before the head.
    """

    width: int = 256
    heads: int = 4
    layers: int = 2
    fusion_layers: int = 2
    dropout: float = 0.4

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Logits (b, u, c) of the head "fusion"; features hold each stream's turns (b, u, d), for the triplets."""
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
        entered = x
        for i in range(self.layers):
            x = PreNormBlock(self.heads, 2 * self.width, jax.nn.relu, 1e-5, self.dtype, name=f"{stream}_{i}")(x, mask)
        return jnp.where(mask[..., None], entered + x, 0)


def adaptive_triplet(x: jax.Array, label: jax.Array, counts: jax.Array) -> jax.Array:
    """Triplet loss whose margin grows with what is still wrong (Chudasama et al. 2022, section 3.2, our reading).

    Streams are scaled to length 1. Of each anchor the farthest vector of its class and the nearest of another are
    taken, at distances p and q; margin = 2 + 2 / (exp(4 p) + ε) + 2 / (exp(4 − 4 q) + ε), ε = 1e-5, without a
    gradient through it.

    Args:
      x: (n, d); label: (n,); counts: (n,) bool, which may be anchors or be compared with.

    Returns:
      (n,) float32, 0 for an anchor that lacks either.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
    distance = jnp.sqrt(jnp.maximum(2 - 2 * x @ x.T, 1e-6))
    alike = label[:, None] == label[None]
    pairs = counts[:, None] & counts[None]
    friends, others = pairs & alike & ~jnp.eye(len(x), dtype=bool), pairs & ~alike
    far = jnp.max(jnp.where(friends, distance, 0), -1)
    near = jnp.min(jnp.where(others, distance, 4), -1)
    margin = jax.lax.stop_gradient(2 + 2 / (jnp.exp(4 * far) + 1e-5) + 2 / (jnp.exp(4 - 4 * near) + 1e-5))
    both = jnp.any(friends, -1) & jnp.any(others, -1)
    return jnp.where(both, jnp.maximum(far - near + margin, 0), 0)


def m2fnet_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Cross entropy, and a twentieth of each stream's `adaptive_triplet` over the scored turns of the batch.

    The paper trains the extractors of sound and picture by the triplets, apart; features are given here, so that the
    streams' transformers take their place. In training alone does a clip's loss depend on its batch.

    Raises:
      AvjaxError: labels are no classes.
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
