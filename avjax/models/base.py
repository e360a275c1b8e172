"""The output of every model, and its description for the trainer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from avjax import tasks

Batch = Mapping[str, jax.Array]  # `<stream>` (b, n, w) and `<stream>_mask` (b, n) of each stream, "label", "weight"
Streams = dict[str, jax.Array]  # by the name of a stream
Stream = tuple[jax.Array, jax.Array]  # (b, n, d) and its mask (b, n)

CHOSEN = "chosen"  # name of the head that validation chose


@flax.struct.dataclass
class Output:
    """The output of a model for a batch; unused parts cost nothing under jit.

    Attributes:
      logits: head name → (b, c). The first head is the one that predicts.
      features: name → (b, d), such as the vector that each head reads.
      attention: name → weights, for figures.
    """

    logits: dict[str, jax.Array]
    features: dict[str, jax.Array]
    attention: dict[str, jax.Array]


@flax.struct.dataclass
class Model:
    """A model built from a configuration.

    Attributes:
      module: `module.apply(variables, batch, train=..., rngs=...)` → `Output`.
      loss: (output, batch, class_prior (c,)) → {term: (b,)}, unreduced and already weighted; their sum is minimised.
      heads: head names, the predicting one first.
      task: the kind of task (`avjax.tasks.SCORINGS`).
      frame_stream: the stream that is raw frames, uint8 (b, t, h, w, 3), "" for none.
      candidates: the heads among which validation chooses the predicting one in each fold, if there are several.
      attention_maps: (name in `Output.attention`, stream of the queries, stream of the keys) of weights (b, q, k) to
        plot.
      streams: the batch streams that the model reads, such as `("text", "audio", "video")`.
      readers: names of the classifiers that read the features after training, the predicting one first; they replace
        the heads. See `avjax.evaluation.predictor`.
      whole_batch: whether a clip's loss depends on the others of its batch, so that no batch may be split.
      constants: batch key → an input that all batches and lanes share, such as pretrained weights.
      turns: whether a row of its batch is a conversation: streams (b, u, n, d) with masks (b, u, n), `turn_mask`
        (b, u), and logits (b, u, c), losses (b, u).
    """

    module: nn.Module = flax.struct.field(pytree_node=False)
    loss: Callable[[Output, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]] = flax.struct.field(
        pytree_node=False
    )
    heads: tuple[str, ...] = flax.struct.field(pytree_node=False)
    streams: tuple[str, ...] = flax.struct.field(pytree_node=False)
    task: str = flax.struct.field(pytree_node=False, default="single")
    turns: bool = flax.struct.field(pytree_node=False, default=False)
    frame_stream: str = flax.struct.field(pytree_node=False, default="")
    candidates: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    attention_maps: tuple[tuple[str, str, str], ...] = flax.struct.field(pytree_node=False, default=())
    readers: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    whole_batch: bool = flax.struct.field(pytree_node=False, default=False)
    # Arrays have no hash, but jit hashes the object that a method is bound to.
    constants: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict, hash=False, compare=False)

    @property
    def prediction_heads(self) -> tuple[str, ...]:
        """Returns the heads whose predictions are kept, first the predicting one, "chosen" if validation chooses it."""
        return self.readers or ((CHOSEN, *self.heads) if len(self.candidates) > 1 else self.heads)


Loss = Callable[[Output, Batch, jax.Array], dict[str, jax.Array]]
Build = Callable[[Any, int, str], Model]
# The loss of a fusion, which needs no class prior: (output, batch, task) → {term: (b,)}.
TaskLoss = Callable[[Output, Batch, str], dict[str, jax.Array]]


def head_loss(output: Output, batch: Batch, head: str, task: str) -> jax.Array:
    """Computes the task's loss of one head per clip, 0 where a clip lacks the stream that the head is named after."""
    label, weight, loss = batch["label"], batch["weight"], tasks.SCORINGS[task].loss
    if f"{head}_mask" not in batch:
        return loss(output.logits[head], label, weight)
    present = jnp.any(batch[f"{head}_mask"], -1)
    return jnp.where(present, loss(output.logits[head], label, weight * present), 0.0)


def heads_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes `head_loss` of every head."""
    return {head: head_loss(output, batch, head, task) for head in output.logits}


def fusion_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes `head_loss` of the head "fusion" alone."""
    return {"fusion": head_loss(output, batch, "fusion", task)}


def stream_heads(module: nn.Module) -> tuple[str, ...]:
    """Returns the heads "fusion" and one per stream."""
    return ("fusion", *module.streams)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A fusion of feature sequences: how it is built, trained and cited.

    Attributes:
      module: class of the Flax module; its fields are its settings, with the paper's values as defaults.
      paper: authors, year, venue.
      loss: as `Model.loss`, with the task instead of the class prior.
      heads: module → its heads, the predicting one first; candidates: as `Model.candidates`.
      attention_maps: as `Model.attention_maps`.
      needs: streams that it requires; reads: all streams that it can read, () for any.
      least, most: how many streams it can read.
      turns: whether it reads whole conversations, see `Model.turns`.
      choices: setting → its allowed values, for settings that are strings.
      recipe: the paper's optimizer settings: key of the `train` configuration → value.
      small: settings for a few thousand clips, where the paper's sizes are for far more.
    """

    module: type[nn.Module]
    paper: str
    loss: TaskLoss = fusion_loss
    heads: Callable[[nn.Module], tuple[str, ...]] = lambda module: ("fusion",)
    candidates: Callable[[nn.Module], tuple[str, ...]] = lambda module: ()
    attention_maps: tuple[tuple[str, str, str], ...] = ()
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    least: int = 1
    most: int = 3
    turns: bool = False
    choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def streams(self) -> tuple[str, ...]:
        """Returns the streams that it reads by default."""
        return self.module.streams

    def fits(self, streams: Sequence[str]) -> bool:
        """Returns whether it can read exactly these streams."""
        readable = not self.reads or set(streams) <= set(self.reads)
        return readable and set(self.needs) <= set(streams) and self.least <= len(streams) <= self.most
