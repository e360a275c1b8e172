"""Crossmodal transformers: every modality asks the others, step by step, before it is read by itself.

MulT: Tsai et al., "Multimodal Transformer for Unaligned Multimodal Language Sequences", ACL 2019.
AuxFormer: Goncalves and Busso, "AuxFormer: Robust Approach to Audiovisual Emotion Recognition", ICASSP 2022.
Shapes: b clip, n step of a stream (q one that asks, k one that answers), d width, c class.

Both released systems know of no masks: they attend to padding, count as padding the steps whose first projected
channel is zero, and predict from the last step of the batch, padded or not. Here the masks are true ones, positions
count from the first real step and the last real step predicts; `faithful` gives the released behaviour back, padding
read as zeros. On full masks both are the same.

A missing modality is an all-False mask. Asked by others it adds nothing but biases; its own vector is zero.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.masking import enter, last_step, positions
from avjax.layers.transformer import CrossBlock, sinusoids
from avjax.models.base import Fusion, Output, head_loss, stream_heads


def no_future(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """What each step of one stream may ask of another, as in the released code (the paper has no such mask).

    A step sees the other's steps up to its own number plus the difference of their lengths: with the stream itself for
    the other this is the causal mask. Numbers and lengths are the clip's own.

    Args:
      queries: (b, q); keys: (b, k), masks of the streams.
    Returns:
      (b, q, k).
    """
    asks, answers = positions(queries)[:, :, None], positions(keys)[:, None, :]
    slack = jnp.abs(jnp.max(asks, 1, keepdims=True) - jnp.max(answers, 2, keepdims=True))
    return keys[:, None, :] & (answers - asks <= slack)


class Encoder(nn.Module):
    """A stack of `CrossBlock`s on scaled and, if `placed`, position-embedded streams, with a last norm.

    `causal` hides the future (`no_future`); `mixed` as in `CrossBlock`; `faithful` as in this file's description.
    """

    layers: int
    heads: int
    causal: bool = True
    placed: bool = True
    mixed: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    faithful: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, mask, source=None, source_mask=None, train: bool = False) -> jax.Array:
        """Maps x (b, q, d), asking source (b, k, d) or else itself, under their masks, to (b, q, d)."""
        mask_of_keys = mask if source is None else source_mask
        admitted = no_future(mask, mask_of_keys) if self.causal else mask_of_keys
        drop = Dropout(self.embedding_dropout, train)
        x = drop(self._embed(x, mask))
        source = None if source is None else drop(self._embed(source, source_mask))
        for i in range(self.layers):
            block = CrossBlock(
                self.heads, 4 * x.shape[-1], dtype=self.dtype, mixed=self.mixed,
                dropout=self.dropout, attention_dropout=self.attention_dropout, name=f"layer_{i}",
            )  # fmt: skip
            x = block(x, x if source is None else source, admitted, train)
        return nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")(x)

    def _embed(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        scaled = x * jnp.sqrt(x.shape[-1]).astype(x.dtype)
        if not self.placed:
            return scaled
        place = positions(mask)
        if self.faithful:
            place = jnp.where(x[..., 0] != 0, place, 0)
        return scaled + sinusoids(place, x.shape[-1]).astype(x.dtype)


class Residual(nn.Module):
    """A perceptron of the given widths, ReLU between them, and the vector itself: (b, d) → (b, d)."""

    widths: tuple[int, ...]
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        hidden = x
        for i, width in enumerate(self.widths):
            hidden = Project((width,), dtype=self.dtype, name=f"hidden_{i}")(hidden)
            hidden = Dropout(self.dropout, train)(jax.nn.relu(hidden))
        return x + Project(x.shape[-1:], dtype=self.dtype, name="out")(hidden)


class MulT(nn.Module):
    """Multimodal Transformer (Tsai et al. 2019, section 3).

    Every stream asks each of the others in a crossmodal transformer; the answers, joined, go through a transformer of
    the stream's own, whose last step is its vector. The defaults are those of the paper's Table 5 for IEMOCAP.

    Attributes:
      classes: number of classes c.
      streams: two or more of text, audio, video.
      width: d of a projected stream; heads: divides it.
      layers: blocks of a crossmodal transformer; those of the streams' own have 3 at least, as in the released code.
      causal: hide the future, as the released code does.
      dropout: rate in the residual branches; attention_dropout: on the weights; embedding_dropout: on the embedded
        streams; out_dropout: in the last perceptron.
      faithful: the released code's way with padding, see the description of this file.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 40
    heads: int = 10
    layers: int = 4
    causal: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.25
    embedding_dropout: float = 0.3
    out_dropout: float = 0.1
    faithful: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold the joined vectors as "joint", beside what the head reads.
        """
        steps, masks = enter(batch, self.streams, self.dtype, self.faithful)
        steps = {s: Project((self.width,), dtype=self.dtype, bias=False, name=f"project_{s}")(steps[s]) for s in steps}
        joint = jnp.concatenate([self._vector(s, steps, masks, train) for s in self.streams], -1)
        fused = Residual(joint.shape[-1:], self.out_dropout, self.dtype, name="fuse")(joint, train)
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output(logits={"fusion": logits}, features={"fusion": fused, "joint": joint}, attention={})

    def _vector(self, stream: str, steps, masks, train: bool) -> jax.Array:
        """The last step of a stream that has asked all others: (b, (streams - 1)·d)."""
        answers = []
        for other in self.streams:
            if other != stream:
                encoder = self._encoder(self.layers, f"{stream}_with_{other}")
                answers.append(encoder(steps[stream], masks[stream], steps[other], masks[other], train))
        own = self._encoder(max(self.layers, 3), f"{stream}_memory")
        return last_step(own(jnp.concatenate(answers, -1), masks[stream], train=train), masks[stream])

    def _encoder(self, layers: int, name: str) -> Encoder:
        return Encoder(
            layers, self.heads, self.causal, dropout=self.dropout, attention_dropout=self.attention_dropout,
            embedding_dropout=self.embedding_dropout, faithful=self.faithful, dtype=self.dtype, name=name,
        )  # fmt: skip


class AuxFormer(nn.Module):
    """AuxFormer (Goncalves and Busso 2022): a crossmodal network and one auxiliary network for each modality.

    Main network: each of two streams asks the other, then itself with learned mixtures; the last steps join.
    Auxiliary networks: a transformer, applied three times over, and a perceptron and head that the streams share.
    The defaults are those of the released code, whose projection of the sound has no bias.

    Attributes:
      classes: number of classes c.
      streams: two of text, audio, video.
      width: d; a stream of this width enters as it is, as the paper's video does; heads: divides it.
      layers: blocks of every transformer.
      hidden: widths of the auxiliary perceptron.
      repeats: how often an auxiliary transformer is applied.
      causal, faithful: as in `MulT`; the dropouts likewise.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    width: int = 50
    heads: int = 10
    layers: int = 5
    hidden: tuple[int, ...] = (512, 256)
    repeats: int = 3
    causal: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embedding_dropout: float = 0.25
    out_dropout: float = 0.2
    faithful: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; heads "fusion" and the streams."""
        steps, masks = enter(batch, self.streams, self.dtype, self.faithful)
        steps = {s: self._project(s, steps[s]) for s in self.streams}
        pairs = zip(self.streams, self.streams[::-1], strict=True)
        joint = jnp.concatenate([self._asked(s, other, steps, masks, train) for s, other in pairs], -1)
        features = {"fusion": Residual(joint.shape[-1:], self.out_dropout, self.dtype, name="fuse")(joint, train)}
        auxiliary = Residual(self.hidden, self.out_dropout, self.dtype, name="auxiliary")
        features |= {s: auxiliary(self._alone(s, steps[s], masks[s], train), train) for s in self.streams}
        shared = nn.Dense(self.classes, name="head_auxiliary")
        heads = {"fusion": nn.Dense(self.classes, name="head_fusion")} | dict.fromkeys(self.streams, shared)
        logits = {name: heads[name](x.astype(jnp.float32)) for name, x in features.items()}
        return Output(logits=logits, features=features, attention={})

    def _project(self, stream: str, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.width:
            return x
        return Project((self.width,), dtype=self.dtype, bias=False, name=f"project_{stream}")(x)

    def _asked(self, stream: str, other: str, steps, masks, train: bool) -> jax.Array:
        cross = self._encoder(f"{stream}_with_{other}", attention_dropout=0.0)
        x = cross(steps[stream], masks[stream], steps[other], masks[other], train)
        own = self._encoder(f"{stream}_memory", placed=False, mixed=True)
        return last_step(own(x, masks[stream], train=train), masks[stream])

    def _alone(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        encoder = self._encoder(f"{stream}_alone", placed=False)
        for _ in range(self.repeats):
            x = encoder(x, mask, train=train)
        return last_step(x, mask)

    def _encoder(self, name: str, **more) -> Encoder:
        settings = {"dropout": self.dropout, "attention_dropout": self.attention_dropout} | more
        return Encoder(
            self.layers, self.heads, self.causal, embedding_dropout=self.embedding_dropout,
            faithful=self.faithful, dtype=self.dtype, name=name, **settings,
        )  # fmt: skip


def auxformer_loss(output: Output, batch: Mapping[str, jax.Array], prior: jax.Array) -> dict[str, jax.Array]:
    """One third of the cross entropy of each head: {head: (b,)}; a modality that a clip lacks costs nothing there."""
    return {head: head_loss(output, batch, head) / 3 for head in output.logits}


FUSIONS: dict[str, Fusion] = {
    "mult": Fusion(
        module=MulT,
        small={"layers": 1},
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 2e-3, "batch_size": 32, "epochs": 30, "weight_decay": 0.0},
        paper="Tsai et al. 2019, ACL",
    ),
    "auxformer": Fusion(
        module=AuxFormer,
        loss=auxformer_loss,
        small={"layers": 1, "repeats": 1},
        heads=stream_heads,
        least=2,
        most=2,
        recipe={"optimizer": "adam", "learning_rate": 7.25e-4, "batch_size": 32, "epochs": 30, "weight_decay": 0.0},
        paper="Goncalves and Busso 2022, ICASSP",
    ),
}
