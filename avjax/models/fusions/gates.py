"""Gates: modalities shift or rescale each other's features.

MAG: Rahman et al., "Integrating Multimodal Information in Large Pretrained Transformers", ACL 2020.
MMTM: Joze et al., "MMTM: Multimodal Transfer Module for CNN Fusion", CVPR 2020.
MSAF: Su et al., "MSAF: Multimodal Split Attention Fusion", 2020.
Shapes: b clip, n step of a stream (l token), d width, g channel block, c class.

A missing modality is an all-False mask. For MAG, sound or picture that is missing shifts nothing; without text nothing
is pooled and the answer is the head's bias. For MMTM and MSAF its average is zero and its part of the joined vector
too, and in MSAF its blocks take no share of the attention.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.masking import align, enter, masked_mean, masked_softmax
from avjax.layers.transformer import PreNormBlock
from avjax.models.base import Fusion, Output

Streams = dict[str, jax.Array]


def length(x: jax.Array) -> jax.Array:
    """Euclidean norm of the last axis, kept, in float32, with a zero gradient where it is zero."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


class MagBlock(nn.Module):
    """Multimodal adaptation gate (Rahman et al. 2020, Eqs. 1–5): text steps shifted by what goes with them.

    The shift is at most `shift` (β) times as long as the step itself.
    """

    shift: float
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array, others: Streams, masks: Streams, train: bool = False) -> jax.Array:
        """text (b, l, d), others aligned with it (b, l, w) with masks (b, l) → (b, l, d)."""
        project = lambda name: Project(text.shape[-1:], dtype=self.dtype, name=name)  # noqa: E731
        moved = jnp.zeros_like(text)
        for stream, x in others.items():
            gate = jax.nn.relu(project(f"gate_{stream}")(jnp.concatenate([x, text], -1)))
            moved += jnp.where(masks[stream][..., None], gate * project(f"shift_{stream}")(x), 0)
        size = length(moved)
        share = jnp.minimum(self.shift * length(text) / (jnp.where(size > 0, size, 1.0) + 1e-6), 1.0)
        norm = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")
        return Dropout(self.dropout, train)(norm(text + share.astype(text.dtype) * moved))


class Mag(nn.Module):
    """The gate of `MagBlock` on the text's features, then their mean over the real tokens and a head.

    The paper puts the gate inside BERT, with streams aligned word by word; here the text's features are given, and each
    other stream is averaged over the span of the clip that a token takes up (`layers.align`).

    Attributes:
      classes: number of classes c.
      streams: text and any others.
      shift: β.
      dropout: rate on the gated text.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    shift: float = 1.0
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams."""
        steps, masks = enter(batch, self.streams, self.dtype)
        aligned = {s: align(steps[s], masks[s], masks["text"]) for s in self.streams if s != "text"}
        others = {s: x for s, (x, _) in aligned.items()}
        seen = {s: mask for s, (_, mask) in aligned.items()}
        text = MagBlock(self.shift, self.dropout, self.dtype, name="gate")(steps["text"], others, seen, train)
        fused = masked_mean(text, masks["text"])
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused}, {})


class MmtmBlock(nn.Module):
    """Multimodal transfer module (Joze et al. 2020, section 3.2): averages of all streams excite each one's channels.

    Squeeze: the averages over time, joined, through a dense layer of 1/`reduction` of their width. Excitation: twice
    the sigmoid of a dense layer per stream, so that a zero excitation changes nothing.
    """

    reduction: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Streams (b, n, d) with masks (b, n) → the same, rescaled."""
        squeezed = jnp.concatenate([masked_mean(x, masks[s]) for s, x in steps.items()], -1)
        width = max(squeezed.shape[-1] // self.reduction, 1)
        joint = jax.nn.relu(Project((width,), dtype=self.dtype, name="squeeze")(squeezed))
        excited = {s: Project(x.shape[-1:], dtype=self.dtype, name=f"excite_{s}")(joint) for s, x in steps.items()}
        return {s: x * 2 * jax.nn.sigmoid(excited[s])[:, None] for s, x in steps.items()}


class MsafBlock(nn.Module):
    """Multimodal split attention (Su et al. 2020, section 3): blocks of channels of all streams compete.

    Every stream is split into blocks of `block` channels, the last one filled up with zeros. The blocks' sums,
    averaged over time and summed over streams, give each block a weight per channel; these sum to 1 over all blocks.

    The released block normalises the joint vector by a batch norm, which makes clips depend on each other; its
    evaluation form folds into the dense layer before it, so it is left out here. `dropout` drops whole blocks.
    """

    block: int
    reduction: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Streams (b, n, d) with masks (b, n) → the same, rescaled."""
        drop = Dropout(self.dropout, train, shared=(1, 3))
        split = {s: drop(self._split(x)) for s, x in steps.items()}  # b n g block
        joint = sum(masked_mean(jnp.sum(x, 2), masks[s]) for s, x in split.items())
        joint = jax.nn.relu(Project((max(self.block // self.reduction, 1),), dtype=self.dtype, name="joint")(joint))
        present = {s: jnp.any(masks[s], -1, keepdims=True) for s in split}
        present = jnp.concatenate([jnp.broadcast_to(present[s], (len(joint), x.shape[2])) for s, x in split.items()], 1)
        scores = Project((self.block, present.shape[1]), dtype=self.dtype, name="attention")(joint)
        weights = jnp.moveaxis(masked_softmax(scores, present[:, None]), 1, 2)  # b g block
        shares = self._apart(weights, {s: x.shape[2] for s, x in split.items()})
        scaled = {s: (x * shares[s][:, None]).reshape(*x.shape[:2], -1) for s, x in split.items()}
        return {s: x[..., : steps[s].shape[-1]] for s, x in scaled.items()}

    def _split(self, x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % self.block)))
        return filled.reshape(*x.shape[:2], -1, self.block)

    def _apart(self, weights: jax.Array, counts: dict[str, int]) -> Streams:
        """The weights of all blocks (b, g, block) by stream."""
        ends = [sum(list(counts.values())[: i + 1]) for i in range(len(counts) - 1)]
        return dict(zip(counts, jnp.split(weights, ends, 1), strict=True))


class Towers(nn.Module):
    """A transformer per stream, a gate between each two layers, and a head on the joined averages.

    The papers put their blocks between the layers of convolutional networks; on feature sequences a transformer layer
    takes the place of a stage of such a network. Subclasses say which block it is.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video.
      width: d of a projected stream; heads: divides it; layers: of each tower.
      dropout: rate on the projected streams and the joined averages.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 128
    heads: int = 4
    layers: int = 2
    dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32

    def gate(self, name: str) -> nn.Module:
        """The block between two layers: (steps, masks, train) → steps."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams."""
        drop = Dropout(self.dropout, train)
        steps, masks = enter(batch, self.streams, self.dtype)
        steps = {s: drop(Project((self.width,), dtype=self.dtype, name=f"project_{s}")(steps[s])) for s in steps}
        for i in range(self.layers):
            if i:
                steps = self.gate(f"gate_{i}")(steps, masks, train)
            steps = {s: self._layer(f"{s}_{i}")(x, masks[s]) for s, x in steps.items()}
        fused = drop(jnp.concatenate([masked_mean(steps[s], masks[s]) for s in self.streams], -1))
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused}, {})

    def _layer(self, name: str) -> PreNormBlock:
        return PreNormBlock(self.heads, 4 * self.width, jax.nn.relu, 1e-5, self.dtype, name=name)


class Mmtm(Towers):
    """`Towers` gated by `MmtmBlock`s; `reduction` as there."""

    reduction: int = 4

    def gate(self, name: str) -> MmtmBlock:
        return MmtmBlock(self.reduction, self.dtype, name=name)


class Msaf(Towers):
    """`Towers` gated by `MsafBlock`s; `block`, `reduction` and `block_dropout` as there."""

    block: int = 16
    reduction: int = 4
    block_dropout: float = 0.2

    def gate(self, name: str) -> MsafBlock:
        return MsafBlock(self.block, self.reduction, self.block_dropout, self.dtype, name=name)


FUSIONS: dict[str, Fusion] = {
    "mag": Fusion(
        module=Mag,
        needs=("text",),
        recipe={"learning_rate": 1e-5, "batch_size": 48, "epochs": 40},
        paper="Rahman et al. 2020, ACL",
    ),
    "mmtm": Fusion(
        module=Mmtm,
        recipe={"learning_rate": 1e-3},
        paper="Joze et al. 2020, CVPR",
    ),
    "msaf": Fusion(
        module=Msaf,
        recipe={"learning_rate": 1e-3, "batch_size": 4, "epochs": 70},
        paper="Su et al. 2020",
    ),
}
