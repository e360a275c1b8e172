"""What fusions share: their first fields and their head, and terms of losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.models.base import Batch, Output, Streams


class FusionModule(nn.Module):
    """The fields that every fusion has, and the head that most of them end in.

    Attributes:
      classes: number of classes c.
      streams: those it reads; any of text, audio, video, unless the fusion says otherwise.
      dtype: compute dtype; parameters stay float32, as do softmax and logits.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    dtype: jnp.dtype = jnp.float32

    def predict(self, fused: jax.Array, features: Streams | None = None, attention: Streams | None = None) -> Output:
        """Maps the fused vector (..., d) to the logits (..., c) of the head "fusion", beside what else is kept."""
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused} | (features or {}), attention or {})


def named(kind: str, vectors: Streams) -> Streams:
    """Names the vectors of a kind as features "<kind>_<stream>"."""
    return {f"{kind}_{s}": x for s, x in vectors.items()}


def of_kind(output: Output, kind: str) -> Streams:
    """Finds what `named` put into the features, in float32: stream → (b, d)."""
    found = {name: x for name, x in output.features.items() if name.startswith(f"{kind}_")}
    return {name.removeprefix(f"{kind}_"): x.astype(jnp.float32) for name, x in found.items()}


def has_stream(batch: Batch, stream: str) -> jax.Array:
    """Says whether each clip has any step of a stream: (b,)."""
    return jnp.any(batch[f"{stream}_mask"], -1)


def counted(batch: Batch, *streams: str) -> jax.Array:
    """Says whether each clip is no padding of the batch and has all these streams: (b,)."""
    weighed = [batch["weight"] > 0] if "weight" in batch else []
    return functools.reduce(jnp.logical_and, [*(has_stream(batch, s) for s in streams), *weighed])


def for_clips(batch: Batch, value: jax.Array) -> jax.Array:
    """Gives a value of the batch (), to each of its clips: (b,)."""
    return jnp.broadcast_to(value, batch["weight"].shape)
