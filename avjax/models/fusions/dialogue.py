"""Fusions that read a whole conversation: what others say before and after tells about a turn.

bc-LSTM: Poria et al., "Context-Dependent Sentiment Analysis in User-Generated Videos", ACL 2017.
M2FNet: Chudasama et al., "M2FNet: Multi-modal Fusion Network for Emotion Recognition in Conversation", CVPRW 2022.
Shapes: b conversation, u turn, n step of a stream, d width, h head, c class.

A batch holds conversations: `<stream> (b, u, n, w)` with `<stream>_mask (b, u, n)`, and `turn_mask (b, u)`. A turn is
the mean of its real steps. A turn that lacks a stream neither asks nor is asked in it: bc-LSTM then holds what the
turns around it said, M2FNet reads zeros. A clip of no conversation is a conversation of one turn.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax import tasks
from avjax.errors import AvjaxError
from avjax.layers.attention import attend
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.lstm import Recurrence
from avjax.layers.masking import enter, masked_mean
from avjax.layers.transformer import PreNormBlock
from avjax.models.base import Fusion, Output, head_loss, heads_loss, stream_heads

Streams = dict[str, jax.Array]


def turns(batch: Mapping[str, jax.Array], streams: tuple[str, ...], dtype: jnp.dtype) -> tuple[Streams, Streams]:
    """Each stream's turns (b, u, w), the means of their real steps, and which turns have the stream, (b, u)."""
    steps, masks = enter(batch, streams, dtype)
    present = {s: jnp.any(masks[s], -1) & batch["turn_mask"] for s in streams}
    return {s: masked_mean(steps[s], masks[s]) for s in streams}, present


class Context(nn.Module):
    """A bidirectional LSTM over turns and a dense layer with tanh (Poria et al. 2017, section 3.2)."""

    hidden: int
    width: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps x (b, u, w) under mask (b, u) to (b, u, width)."""
        drop = Dropout(self.dropout, train)
        ways = {"forward": False, "backward": True}
        states = [Recurrence(self.hidden, back, self.dtype, name=way)(x, mask)[0] for way, back in ways.items()]
        x = drop(jnp.concatenate(states, -1).astype(self.dtype))
        return drop(jnp.tanh(Project((self.width,), dtype=self.dtype, name="dense")(x)))


class BcLstm(nn.Module):
    """Hierarchical bc-LSTM (Poria et al. 2017, section 3.3): a context LSTM per stream, and one above them all.

    The authors train the streams' LSTMs first and the upper one on their answers; here all are trained at once, and no
    gradient passes from the upper one down, which comes to the same.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video.
      hidden: width of each LSTM; width: of the dense layers behind them.
      dropout: rate behind the LSTMs and the dense layers.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    hidden: int = 300
    width: int = 100
    dropout: float = 0.6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Logits (b, u, c): head "fusion" and one per stream; see the description of this file for the batch."""
        means, present = turns(batch, self.streams, self.dtype)
        features = {s: self._context(f"{s}_context")(means[s], present[s], train) for s in self.streams}
        below = jax.lax.stop_gradient(jnp.concatenate(list(features.values()), -1))
        features = {"fusion": self._context("context")(below, batch["turn_mask"], train)} | features
        logits = {s: nn.Dense(self.classes, name=f"head_{s}")(x.astype(jnp.float32)) for s, x in features.items()}
        return Output(logits, features, {})

    def _context(self, name: str) -> Context:
        return Context(self.hidden, self.width, self.dropout, self.dtype, name=name)


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


class M2FNet(nn.Module):
    """M2FNet (Chudasama et al. 2022): a transformer over turns per stream, then layers of fusion attention.

    The main stream, the text in the paper, is the first of `streams`.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video, the main one first.
      width: d; heads: divides it.
      layers: of each stream's transformer, around which its input is added; fusion_layers: of fusion attention.
      dropout: rate on the streams' turns and before the head.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 256
    heads: int = 4
    layers: int = 2
    fusion_layers: int = 2
    dropout: float = 0.4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
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
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused} | alone, {})

    def _stream(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Project((self.width,), dtype=self.dtype, name=f"project_{stream}")(x)
        entered = x
        for i in range(self.layers):
            x = PreNormBlock(self.heads, 2 * self.width, jax.nn.relu, 1e-5, self.dtype, name=f"{stream}_{i}")(x, mask)
        return jnp.where(mask[..., None], entered + x, 0)


def adaptive_triplet(x: jax.Array, label: jax.Array, counts: jax.Array) -> jax.Array:
    """Triplet loss whose margin grows with what is still wrong (Chudasama et al. 2022, section 3.2, our reading).

    Vectors are scaled to length 1. Of each anchor the farthest vector of its class and the nearest of another are
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


def m2fnet_loss(output: Output, batch: Mapping[str, jax.Array], prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy, and a twentieth of each stream's `adaptive_triplet` over the scored turns of the batch.

    The paper trains the extractors of sound and picture by the triplets, apart; features are given here, so that the
    streams' transformers take their place. In training alone does a clip's loss depend on its batch.

    Raises:
      AvjaxError: labels are no classes.
    """
    label = batch["label"]
    if tasks.kind(label) != "single":
        raise AvjaxError(
            f"m2fnet's triplets compare classes; this is a task of {tasks.kind(label)}: take another model"
        )
    terms = {"fusion": head_loss(output, batch, "fusion")}
    for s in [name for name in output.features if name != "fusion"]:
        counts = jnp.any(batch[f"{s}_mask"], -1) & (batch["weight"] > 0 if "weight" in batch else True)
        x = output.features[s]
        triplets = adaptive_triplet(x.reshape(-1, x.shape[-1]), label.reshape(-1), counts.reshape(-1))
        terms[f"{s}_triplet"] = 0.05 * triplets.reshape(label.shape)
    return terms


FUSIONS: dict[str, Fusion] = {
    "bc_lstm": Fusion(
        module=BcLstm,
        paper="Poria et al. 2017, ACL",
        loss=heads_loss,
        heads=stream_heads,
        turns=True,
        recipe={"batch_size": 10},
    ),
    "m2fnet": Fusion(
        module=M2FNet,
        paper="Chudasama et al. 2022, CVPR workshops",
        loss=m2fnet_loss,
        turns=True,
        recipe={"learning_rate": 5e-4, "batch_size": 8},
    ),
}
