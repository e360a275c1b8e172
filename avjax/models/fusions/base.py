"""The base class of fusions, and functions for their losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.models.base import Batch, Output, Streams


class FusionModule(nn.Module):
    """The common fields of fusions, and the head that most of them end in.

    Attributes:
      classes: number of classes c.
      streams: the streams it reads; any of text, audio, video, unless the fusion states otherwise.
      dtype: compute dtype; parameters stay float32, as do softmax and logits.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    dtype: jnp.dtype = jnp.float32

    def predict(self, fused: jax.Array, features: Streams | None = None, attention: Streams | None = None) -> Output:
        """Maps the fused vector (..., d) to the logits (..., c) of the head "fusion"; adds features and attention."""
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused} | (features or {}), attention or {})


def named(kind: str, vectors: Streams) -> Streams:
    """Names the vectors of a kind as features "<kind>_<stream>"."""
    return {f"{kind}_{s}": x for s, x in vectors.items()}


def of_kind(output: Output, kind: str) -> Streams:
    """Returns the features that `named` added, in float32: stream → (b, d)."""
    features = {name: x for name, x in output.features.items() if name.startswith(f"{kind}_")}
    return {name.removeprefix(f"{kind}_"): x.astype(jnp.float32) for name, x in features.items()}


def has_stream(batch: Batch, stream: str) -> jax.Array:
    """Returns whether each clip has any step of a stream: (b,)."""
    return jnp.any(batch[f"{stream}_mask"], -1)


def counted(batch: Batch, *streams: str) -> jax.Array:
    """Returns whether each clip is real, not padding, and has all these streams: (b,)."""
    real = [batch["weight"] > 0] if "weight" in batch else []
    return functools.reduce(jnp.logical_and, [*(has_stream(batch, s) for s in streams), *real])


def for_clips(batch: Batch, value: jax.Array) -> jax.Array:
    """Broadcasts a value of the batch () to its clips: (b,)."""
    return jnp.broadcast_to(value, batch["weight"].shape)
