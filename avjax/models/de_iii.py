"""DE-III: optical flow enhances video, and audio and video attend to each other.

Shi, Ge, Jose, Pugeault, Henderson 2024, "Detail-Enhanced Intra- and Inter-modal Interaction for Audio-Visual Emotion
Recognition". Equation and table numbers are the paper's. Shapes: b clip, t video step, s audio step, n step of any
sequence, q query, k key, d width, c class.

One module covers every row of Tables 2 and 3, as each combines five choices: which streams are read, how the two visual
ones are merged (Eqs. 2–3), what encodes a sequence (Eq. 1), whether the modalities attend to each other (Eqs. 4–6), and
which head predicts.

Video and flow share one time base, on which either may lack a step that the other has: the face was not detected, or
the flow not computed. Each is encoded over its own real steps and is used alone where the other is missing.

A missing stream is an all-False mask. If video or flow is missing, the other one is used for both. Without either, or
without audio, the vector of that modality is zero and adds nothing to the other. A head that reads zeros predicts by
its biases.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import AvjaxError
from avjax.layers import (
    ConformerBlock,
    Dropout,
    PostNormBlock,
    Project,
    interleaved_sinusoids,
    masked_max,
    masked_mean,
    masked_softmax,
    pack,
    stream_inputs,
    unpack,
)
from avjax.models.base import Batch, Fusion, Output, Stream, heads_loss
from avjax.models.fusions.base import FusionModule

VISUALS = ("pae", "early", "concat_time", "concat_channel", "sum")
SEQUENCES = ("conformer", "transformer")
HEADS = ("video", "audio", "fusion")
# Lower bound of a squared length, so that the cosine of a zero vector has a gradient.
_SHORT = 1e-6

# The rows of the paper's tables: name → settings and streams.
VARIANTS: dict[str, dict[str, object]] = {
    # Table 1, and the last rows of Tables 2 and 3.
    "full": {},
    "ife_video": {"head": "video"},
    # Table 2.
    "ife_audio": {"head": "audio"},
    "ife_fusion": {"head": "fusion"},
    "none_ife": {"inter": False, "head": "video"},
    # Table 3: IFE-V-O, F, FOSC, FODC, FODS, Early, Trans.
    "flow_only": {"streams": ("audio", "flow"), "head": "video"},
    "video_only": {"streams": ("audio", "video"), "head": "video"},
    "time_concat": {"visual": "concat_time", "head": "video"},
    "channel_concat": {"visual": "concat_channel", "head": "video"},
    "sum": {"visual": "sum", "head": "video"},
    "early": {"visual": "early", "head": "video"},
    "transformer": {"sequence": "transformer", "head": "video"},
}


class Pae(nn.Module):
    """Pair-wise attention enhancement (PAE), Eqs. 2–3: a weighted sum of flow and video in each step.

    Where a step is real in only one of the two, that one gets all the weight.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, flow: Stream, video: Stream) -> Stream:
        """Maps flow and video (b, t, d) under masks (b, t) to (b, t, width), real where either is real."""
        (flow, flow_mask), (video, video_mask) = flow, video
        scores = Project((2,), dtype=self.dtype, name="weights")(jnp.concatenate([flow, video], -1))
        real = jnp.stack([flow_mask, video_mask], -1)  # b t 2
        weights = masked_softmax(scores.astype(jnp.float32), real).astype(self.dtype)
        linear = lambda name: Project((self.width,), dtype=self.dtype, bias=False, name=name)  # noqa: E731
        weighted = weights[..., :1] * linear("flow")(flow) + weights[..., 1:] * linear("video")(video)
        return weighted, jnp.any(real, -1)


class Ife(nn.Module):
    """Inter-modal feature enhancement (IFE), Eqs. 4–6: single-head attention to the other modality by cosines.

    The feed-forward block has a ReLU between its two linear layers, as in a transformer; without it, two linear layers
    would amount to one.

    Attributes:
      width: d of both modalities, of the projections and of the two layers.
      temperature: divides the cosines before the softmax.
      residual: whether the two layers have a residual too; Eq. 6 has only the first.
    """

    width: int
    temperature: float = 1.0
    residual: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, queries: Stream, source: Stream) -> tuple[jax.Array, jax.Array]:
        """Maps queries (b, q, d) and source (b, k, d), with masks, to (b, q, d) and the weights α (b, q, k), float32.

        Masked queries, and queries without a real key, have zero weights; the output at masked queries is undefined.
        """
        (x, mask), (other, other_mask) = queries, source
        linear = lambda name, bias=False: Project((self.width,), dtype=self.dtype, bias=bias, name=name)  # noqa: E731
        query, key, value = linear("query")(x), linear("key")(other), linear("value")(other)
        cosines = jnp.einsum("bqd,bkd->bqk", _unit(query), _unit(key), preferred_element_type=jnp.float32)
        weights = masked_softmax(cosines / self.temperature, mask[:, :, None] & other_mask[:, None, :])
        x += jnp.einsum("bqk,bkd->bqd", weights.astype(self.dtype), value)
        output = linear("down", bias=True)(nn.relu(linear("up", bias=True)(x)))
        return (x + output if self.residual else output), weights


def _unit(x: jax.Array) -> jax.Array:
    """Scales x (..., d) to length 1, in its own dtype; zeros stay zeros, with a finite gradient."""
    wide = x.astype(jnp.float32)
    squares = jnp.sum(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squares, _SHORT))).astype(x.dtype)


class DeIII(FusionModule):
    """DE-III and, by its settings, every row of the paper's Tables 2 and 3: see `VARIANTS`.

    The paper does not state `kernel`, `expansion` and `dropout`, nor biases, which all layers have except the matrices
    of Eqs. 3, 4 and 6.

    Attributes:
      streams: audio, and one or both of video and flow; one alone is used for both.
      width, heads, kernel, expansion: of the blocks; heads divides width, kernel is odd.
      depths: stream → number of blocks; a joint encoder of video and flow has the video's.
      output: width of a sequence after its blocks, in PAE and in IFE; hidden: inner width of the heads.
      dropout: rate in the blocks, training only.
      temperature, residual: see `Ife`.
      visual: how video and flow are merged, one of `VISUALS`. "pae" encodes each and merges them by `Pae`; "early"
        merges them first. The others also encode once: the video's real steps and then the flow's
        ("concat_time"), their channels side by side before one linear layer ("concat_channel"), or the sum of their
        linear layers ("sum").
      sequence: one of `SEQUENCES`. A "transformer" is the vanilla one that the paper cites (Vaswani et al. 2017): it
        normalises after each sum, has ReLU inside, sinusoids added to its input, and dropout only there.
      inter: whether IFE is used; without it the modalities meet only in the head "fusion".
      head: which of `HEADS` predicts, or "validation" for the best on the validation set.
      legacy_relative: see `conformer.RelativeAttention`.
      dtype: compute dtype; parameters stay float32, as do softmax, lengths of vectors, and logits.
    """

    streams: tuple[str, ...] = ("audio", "video", "flow")
    width: int = 512
    heads: int = 8
    depths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"audio": 3, "video": 3, "flow": 2})
    kernel: int = 31
    expansion: int = 4
    output: int = 1408
    hidden: int = 512
    dropout: float = 0.1
    temperature: float = 1.0
    residual: bool = False
    visual: str = "pae"
    sequence: str = "conformer"
    inter: bool = True
    head: str = "validation"
    legacy_relative: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; video and flow have the same n.

        Heads and features are "video", for video and flow merged, "audio" and "fusion". Attention is "video" (b, t, s)
        and "audio" (b, s, t), zeros where a step is masked: the paper's Figure 2. With "concat_time" each point in time
        has a step of video and one of flow: "video" averages their weights, "audio" sums them.

        Raises:
          AvjaxError: video and flow have different numbers of steps.
        """
        self._check(batch)
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        streams = {s: (x, masks[s]) for s, x in steps.items()}
        sequences = {"video": self._visual(streams, train), "audio": self._alone("audio", streams, train)}
        attention = {}
        if self.inter:
            sequences, attention = self._enhance(sequences)
        vectors = {name: masked_max(*sequence) for name, sequence in sequences.items()}
        vectors["fusion"] = jnp.concatenate([vectors["video"], vectors["audio"]], -1)
        return Output({h: self._predict(h, vectors[h]) for h in HEADS}, vectors, attention)

    @property
    def _both(self) -> bool:
        return {"video", "flow"} <= set(self.streams)

    def _check(self, batch: Batch) -> None:
        video, flow = (batch[f"{s}_mask"].shape[1] if self._both else 0 for s in ("video", "flow"))
        if video != flow:
            raise AvjaxError(f"video has {video} steps and flow {flow}; they share one time base: give equal numbers")

    def _linear(self, name: str, width: int) -> Project:
        return Project((width,), dtype=self.dtype, name=name)

    def _input(self, name: str, stream: Stream) -> Stream:
        """Applies the input layer of a stream: (b, n, width)."""
        x, mask = stream
        return jnp.where(mask[..., None], self._linear(f"{name}_input", self.width)(x), 0), mask

    def _alone(self, name: str, streams: Mapping[str, Stream], train: bool) -> Stream:
        """Encodes one stream (Eq. 1): (b, n, output)."""
        return self._encode(name, self.depths[name], self._input(name, streams[name]), train)

    def _encode(self, name: str, depth: int, stream: Stream, train: bool) -> Stream:
        """Encodes the real steps of (b, n, width) by `depth` blocks and an output layer: (b, n, output)."""
        x, mask = stream
        x, front = pack(x, mask)
        if self.sequence == "transformer":
            embedded = interleaved_sinusoids(np.arange(x.shape[1]), self.width)
            x = Dropout(self.dropout, train)(x + embedded[None].astype(self.dtype))
        for i in range(depth):
            x = self._block(f"{name}_block_{i}", x, front, train)
        x = self._linear(f"{name}_output", self.output)(unpack(x, mask))
        return jnp.where(mask[..., None], x, 0), mask

    def _block(self, name: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        if self.sequence == "transformer":
            return PostNormBlock(self.heads, self.expansion * self.width, nn.relu, 1e-5, self.dtype, name=name)(x, mask)
        settings = (self.heads, self.kernel, self.expansion, self.dropout, self.legacy_relative, self.dtype)
        return ConformerBlock(*settings, name=name)(x, mask, train)

    def _visual(self, streams: Mapping[str, Stream], train: bool) -> Stream:
        """Encodes video and flow for IFE: (b, t, output), or (b, 2t, output) for "concat_time"."""
        if not self._both:
            return self._alone("flow" if "flow" in self.streams else "video", streams, train)
        if self.visual == "pae":
            encoded = (self._alone(s, streams, train) for s in ("flow", "video"))
            return Pae(self.output, self.dtype, name="pae")(*encoded)
        return self._encode("visual", self.depths["video"], self._joined(streams), train)

    def _joined(self, streams: Mapping[str, Stream]) -> Stream:
        """Merges flow and video before any block: (b, t, width), or (b, 2t, width) for "concat_time"."""
        (flow, flow_mask), (video, video_mask) = streams["flow"], streams["video"]
        if self.visual == "concat_channel":
            joined = jnp.concatenate([flow, video], -1)
            return self._linear("visual_input", self.width)(joined), flow_mask | video_mask
        (flow, _), (video, _) = (self._input(s, streams[s]) for s in ("flow", "video"))
        if self.visual == "early":
            return Pae(self.width, self.dtype, name="pae")((flow, flow_mask), (video, video_mask))
        if self.visual == "sum":
            return flow + video, flow_mask | video_mask
        return jnp.concatenate([video, flow], 1), jnp.concatenate([video_mask, flow_mask], 1)

    def _enhance(self, sequences: Mapping[str, Stream]) -> tuple[dict[str, Stream], dict[str, jax.Array]]:
        """Applies `Ife` in both directions: the enhanced sequences, and the weights by the name of the queries."""
        enhanced, attention = {}, {}
        for name, other in (("video", "audio"), ("audio", "video")):
            ife = Ife(self.output, self.temperature, self.residual, self.dtype, name=f"{name}_ife")
            x, attention[name] = ife(sequences[name], sequences[other])
            enhanced[name] = x, sequences[name][1]
        if self._both and self.visual == "concat_time":
            attention = _by_time(attention["video"], attention["audio"], sequences["video"][1])
        return enhanced, attention

    def _predict(self, head: str, x: jax.Array) -> jax.Array:
        """Computes the logits (b, c) of a head, float32."""
        hidden = nn.relu(self._linear(f"{head}_hidden", self.hidden)(x))
        return nn.Dense(self.classes, name=f"{head}_head")(hidden.astype(jnp.float32))


def _by_time(video: jax.Array, audio: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Merges attention weights video (b, 2t, s) and audio (b, s, 2t) under mask (b, 2t) to t points in time."""
    b, twice, s = video.shape
    halves = video.reshape(b, 2, twice // 2, s).swapaxes(1, 2)  # b t 2 s
    real = mask.reshape(b, 2, twice // 2).swapaxes(1, 2)
    return {"video": masked_mean(halves, real), "audio": jnp.sum(audio.reshape(b, s, 2, twice // 2), 2)}


def heads(module: DeIII) -> tuple[str, ...]:
    """Returns the three heads, the predicting one first."""
    return tuple(sorted(HEADS, key=lambda head: head != module.head))


FUSIONS: dict[str, Fusion] = {
    "de_iii": Fusion(
        module=DeIII,
        loss=heads_loss,
        heads=heads,
        candidates=lambda module: HEADS if module.head == "validation" else (),
        attention_maps=(("video", "video", "audio"), ("audio", "audio", "video")),
        needs=("audio",),
        reads=("audio", "video", "flow"),
        least=2,
        most=3,
        choices={"visual": VISUALS, "sequence": SEQUENCES, "head": ("validation", *HEADS)},
        # The paper does not state the batch size.
        recipe={"optimizer": "adamw", "learning_rate": 5e-6, "batch_size": 32, "weight_decay": 5e-2, "epochs": 20},
        small={
            "width": 128,
            "heads": 4,
            "depths": {"audio": 1, "video": 1, "flow": 1},
            "kernel": 15,
            "output": 128,
            "hidden": 64,
        },
        paper="Shi, Ge, Jose, Pugeault, Henderson 2024, DE-III",
    ),
}
