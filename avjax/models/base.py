"""What every model gives back, and what the trainer needs to know of it."""

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

CHOSEN = "chosen"  # stands for the head that validation chose


@flax.struct.dataclass
class Output:
    """The output of a model for a batch; what is not used costs nothing under jit.

    Attributes:
      logits: head name → (b, c). The first head is the one that predicts.
      features: name → (b, d), the vector each head reads.
      attention: name → weights, for pictures.
    """

    logits: dict[str, jax.Array]
    features: dict[str, jax.Array]
    attention: dict[str, jax.Array]


@flax.struct.dataclass
class Model:
    """A registry entry made concrete by a configuration.

    Attributes:
      module: `module.apply(variables, batch, train=..., rngs=...)` → `Output`.
      loss: (output, batch, class_prior (c,)) → {term: (b,)}, unreduced and already weighted; their sum is minimised.
      heads: head names, the predicting one first.
      task: the kind of task (`avjax.tasks.SCORINGS`).
      frame_stream: the stream that is raw frames, uint8 (b, t, h, w, 3), "" for none.
      candidates: the heads among which validation chooses, fold by fold, the one that predicts; one alone has nothing
        to choose.
      attention_maps: (name in `Output.attention`, stream of the queries, stream of the keys) of weights (b, q, k) that
        are drawn.
      streams: the batch streams that the model reads, such as `("text", "audio", "video")`.
      readers: names of the classifiers that read the features after training, the predicting one first; they then stand
        in the place of the heads. `avjax.evaluation.predictor` says what they are.
      whole_batch: whether a clip's loss depends on the others of its batch, so that no batch may be cut into pieces.
      constants: batch key → what every batch is to have whole, all lanes sharing it: pretrained weights.
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
    # Arrays have no hash, and jit asks for one of what a function is bound to.
    constants: Mapping[str, Any] = flax.struct.field(pytree_node=False, default_factory=dict, hash=False, compare=False)

    @property
    def prediction_heads(self) -> tuple[str, ...]:
        """The heads whose predictions are kept; first the predicting one, "chosen" where validation chooses it."""
        return self.readers or ((CHOSEN, *self.heads) if len(self.candidates) > 1 else self.heads)


Loss = Callable[[Output, Batch, jax.Array], dict[str, jax.Array]]
Build = Callable[[Any, int, str], Model]
# Of a fusion, which needs no class prior: (output, batch, kind of task) → {term: (b,)}.
TaskLoss = Callable[[Output, Batch, str], dict[str, jax.Array]]


def head_loss(output: Output, batch: Batch, head: str, task: str) -> jax.Array:
    """Computes the task's loss of one head by clip; one named after a stream costs nothing in clips without it."""
    label, weight, loss = batch["label"], batch["weight"], tasks.SCORINGS[task].loss
    if f"{head}_mask" not in batch:
        return loss(output.logits[head], label, weight)
    there = jnp.any(batch[f"{head}_mask"], -1)
    return jnp.where(there, loss(output.logits[head], label, weight * there), 0.0)


def heads_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes `head_loss` of every head."""
    return {head: head_loss(output, batch, head, task) for head in output.logits}


def fusion_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes `head_loss` of the head "fusion" alone."""
    return {"fusion": head_loss(output, batch, "fusion", task)}


def stream_heads(module: nn.Module) -> tuple[str, ...]:
    """A head of its own for each stream, beside "fusion"."""
    return ("fusion", *module.streams)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A fusion of feature sequences: how it is built, trained and cited.

    Attributes:
      module: class of the Flax module; its fields are its settings, with the paper's values as defaults.
      paper: authors, year, venue.
      loss: as `Model.loss`, with the kind of task in the place of the class prior.
      heads: of a module, the heads it has, the predicting one first; candidates: as `Model.candidates`.
      attention_maps: as `Model.attention_maps`.
      needs: streams that must be among those it reads; reads: all that it can read, () for any.
      least, most: how many streams it can read.
      turns: whether it reads whole conversations, see `Model.turns`.
      choices: setting → the values it may have, of settings that are words.
      recipe: the optimizer's facts as the paper has them: key of the `train` configuration → value.
      small: settings for a few thousand clips, where the paper's sizes were made for far more.
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
        """What it reads unless told otherwise."""
        return self.module.streams

    def fits(self, streams: Sequence[str]) -> bool:
        """Whether it can read just these."""
        readable = not self.reads or set(streams) <= set(self.reads)
        return readable and set(self.needs) <= set(streams) and self.least <= len(streams) <= self.most
