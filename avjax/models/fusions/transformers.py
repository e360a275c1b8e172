"""Transformers that join modalities: T-MEP, MMA-DFER and the three branches of John and Kawanishi.

T-MEP: Zhang et al., "Transformer-Based Multimodal Emotional Perception for Dynamic Facial Expression Recognition in
the Wild", IEEE Transactions on Circuits and Systems for Video Technology 2024.
MMA-DFER: Chumachenko, Iosifidis, Gabbouj, "MMA-DFER: MultiModal Adaptation of unimodal models for Dynamic Facial
Expression Recognition in-the-wild", CVPR Workshops 2024.
Three branches: John and Kawanishi, "Audio and video-based emotion recognition using multimodal transformers", ICPR
2022.
Shapes: b clip, n step of a stream, d width, c class.

Only MMA-DFER has public code. The other two are our reading of which blocks their papers name and what those attend to;
their sizes here are ours, since those of the papers belong to their own encoders of pictures, sound and words.

Positions are sinusoids, counted from a clip's first real step. A missing modality is an all-False mask: nobody attends
to it, and its own vector is zero (MMA-DFER, three branches) or takes no part in a mean (T-MEP). Without any modality
T-MEP and the three branches answer the head's bias, MMA-DFER what its class token says.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.masking import enter, masked_mean, positions
from avjax.layers.transformer import CrossBlock, PreNormBlock, sinusoids
from avjax.models.base import Fusion, Output
from avjax.models.fusions.crossmodal import Encoder

Batch = Mapping[str, jax.Array]
Streams = dict[str, jax.Array]


# ---- T-MEP --------------------------------------------------------------------------------------------------------


class JointLayer(nn.Module):
    """Cross-attention, then self-attention: every stream asks all others, then the steps of all are one sequence."""

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Streams (b, n, d) with masks (b, n) → the same, changed; a stream alone has nobody to ask."""
        inner = 4 * next(iter(steps.values())).shape[-1]
        block = functools.partial(CrossBlock, self.heads, inner, dtype=self.dtype, dropout=self.dropout)
        if len(steps) > 1:
            others = {s: _joined(steps, masks, [o for o in steps if o != s]) for s in steps}
            steps = {s: block(name=f"{s}_asks")(x, *others[s], train) for s, x in steps.items()}
        whole, mask = _joined(steps, masks, list(steps))
        whole = block(name="together")(whole, whole, mask, train)
        lengths = [x.shape[1] for x in steps.values()]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
        return dict(zip(steps, jnp.split(whole, ends, 1), strict=True))


def _joined(steps: Streams, masks: Streams, names: list[str]) -> tuple[jax.Array, jax.Array]:
    """The steps of the named streams behind each other, and their mask."""
    return jnp.concatenate([steps[s] for s in names], 1), jnp.concatenate([masks[s] for s in names], 1)


class Tmep(nn.Module):
    """T-MEP (Zhang et al. 2024): a transformer for each stream, then layers of cross- and self-attention over all.

    The paper maps sound and words into the space of the pictures; here all streams are mapped to one width. The fused
    vector is the mean over the streams that a clip has, each averaged over its real steps, so that a long stream counts
    no more than a short one.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video.
      width: d of a projected stream; heads: divides it.
      layers: of each stream's own transformer; joint_layers: `JointLayer`s behind them.
      dropout: rate in the residual branches.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 256
    heads: int = 8
    layers: int = 2
    joint_layers: int = 2
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; features hold each one's vector too."""
        steps, masks = enter(batch, self.streams, self.dtype)
        steps = {s: Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in steps.items()}
        own = functools.partial(Encoder, self.layers, self.heads, causal=False, dropout=self.dropout, dtype=self.dtype)
        steps = {s: own(name=s)(x, masks[s], train=train) for s, x in steps.items()}
        for i in range(self.joint_layers):
            steps = JointLayer(self.heads, self.dropout, self.dtype, name=f"joint_{i}")(steps, masks, train)
        norm = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")
        vectors = {s: masked_mean(norm(steps[s].astype(jnp.float32)), masks[s]) for s in self.streams}
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)  # b stream
        fused = masked_mean(jnp.stack(list(vectors.values()), 1), present)
        return Output({"fusion": nn.Dense(self.classes, name="head")(fused)}, {"fusion": fused} | vectors, {})


# ---- MMA-DFER -----------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Fusion bottleneck (Chumachenko et al. 2024, section 3): streams meet in a narrow space, as much as gates let in.

    Each stream is mapped to `width` and normalised; to its steps the other streams' averages over time are added; the
    sum, mapped back, is added to the stream times the tanh of a learned number that starts at 0. So at first no stream
    knows of any other, nor of this block.
    """

    width: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams) -> Streams:
        """Streams (b, n, d) with masks (b, n) → the same, changed."""
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


class MmaDfer(nn.Module):
    """MMA-DFER (Chumachenko et al. 2024) on feature sequences: a transformer each, a `Bottleneck` after every layer.

    The last stream is followed over time: to its steps and to a class token the vectors of the others are added, and
    what the token becomes in one more layer goes to the head. In the paper the token is not added to; here it is, so
    that a clip without pictures is still answered by its sound.

    The paper's layers are twelve, pretrained and frozen, with prompts that adapt them; on features there is nothing to
    freeze and so nothing to prompt: ours are few and train. The mean over the real steps stands for their class tokens.
    `train` changes nothing, as in the released temporal layer.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video; the last one is followed over time.
      width, heads, inner: of every layer, as the paper's temporal one; heads divides width.
      layers: of each stream; bottleneck: width of the space where they meet.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    width: int = 512
    heads: int = 8
    inner: int = 1024
    layers: int = 2
    bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; features hold each one's vector too."""
        steps, masks = enter(batch, self.streams, self.dtype)
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
        return Output({"fusion": nn.Dense(self.classes, name="head")(fused)}, {"fusion": fused} | vectors, {})

    def _embed(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Project((self.width,), dtype=self.dtype, name=f"project_{stream}")(x)
        return x + sinusoids(positions(mask), self.width).astype(x.dtype)

    def _over_time(self, x: jax.Array, mask: jax.Array, others: list[jax.Array]) -> jax.Array:
        """What the class token hears: x (b, n, d) under mask (b, n), others (b, d) each → (b, d)."""
        token = self.param("class_token", nn.initializers.normal(0.02), (self.width,)).astype(x.dtype)
        token = jnp.broadcast_to(token[None, None], (len(x), 1, self.width))
        x = sum([v[:, None] for v in others], jnp.concatenate([token, x], 1))
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        block = CrossBlock(self.heads, self.inner, nn.gelu, dtype=self.dtype, name="temporal")
        return block(x[:, :1], x, mask)[:, 0]


# ---- Three branches -----------------------------------------------------------------------------------------------


class ThreeBranch(nn.Module):
    """Three transformer branches (John and Kawanishi 2022): each of two streams by itself, and each asking the other.

    The averages over the real steps of the two self-attention branches and of both directions of the cross-attention
    branch, joined, go to the head. The paper marks the blocks of one picture by a common embedding of its time; here
    a picture is one step, and the position of a step does the same. Where a clip lacks a stream, the branch that needs
    both is zero.

    Attributes:
      classes: number of classes c.
      streams: two of text, audio, video.
      width: d of a projected stream; heads: divides it; layers: of every transformer.
      dropout: rate in the residual branches and on the joined vectors.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    width: int = 128
    heads: int = 8
    layers: int = 2
    dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold the branches beside what the head reads: each stream's (b, d), and "cross" (b, 2d).
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        steps = {s: Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in steps.items()}
        asking = zip(self.streams, self.streams[::-1], strict=True)
        branches = {s: self._alone(s, steps[s], masks[s], train) for s in self.streams}
        branches["cross"] = jnp.concatenate([self._asking(s, o, steps, masks, train) for s, o in asking], -1)
        joined = jnp.concatenate(list(branches.values()), -1)
        fused = Dropout(self.dropout, train)(joined)
        return Output({"fusion": nn.Dense(self.classes, name="head")(fused)}, {"fusion": fused} | branches, {})

    def _alone(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        x = self._encoder(stream)(x, mask, train=train)
        return masked_mean(x.astype(jnp.float32), mask)

    def _asking(self, stream: str, other: str, steps: Streams, masks: Streams, train: bool) -> jax.Array:
        encoder = self._encoder(f"{stream}_asks_{other}")
        x = encoder(steps[stream], masks[stream], steps[other], masks[other], train)
        answered = masks[stream] & jnp.any(masks[other], -1, keepdims=True)
        return masked_mean(x.astype(jnp.float32), answered)

    def _encoder(self, name: str) -> Encoder:
        return Encoder(self.layers, self.heads, causal=False, dropout=self.dropout, dtype=self.dtype, name=name)


FUSIONS: dict[str, Fusion] = {
    "tmep": Fusion(
        module=Tmep,
        small={"width": 128, "layers": 1, "joint_layers": 1},
        paper="Zhang et al. 2024, IEEE TCSVT",
    ),
    "mma_dfer": Fusion(
        module=MmaDfer,
        small={"width": 128, "inner": 256, "bottleneck": 32},
        recipe={"learning_rate": 1e-4, "batch_size": 8, "weight_decay": 1e-2, "epochs": 25},
        paper="Chumachenko, Iosifidis, Gabbouj 2024, CVPR Workshops",
    ),
    "three_branch": Fusion(
        module=ThreeBranch,
        least=2,
        most=2,
        paper="John and Kawanishi 2022, ICPR",
    ),
}
