"""Masked pooling and alignment of sequences.

Masks are boolean, True = real. Every function gives zeros, never NaN, over an empty set, and what lies under a False
mask never reaches the result, so that padding and batch neighbours cannot change a prediction. Softmax runs in float32.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of `scores` among the True entries of `mask`; all zeros where there is none.

    Args:
      scores: (..., n).
      mask: broadcastable to `scores`.

    Returns:
      (..., n) in the dtype of `scores`; each row sums to 1, or to 0 where its mask is empty.
    """
    mask = jnp.broadcast_to(mask, scores.shape)
    kept = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(kept, -1, keepdims=True))
    # The inner `where` keeps exp finite under False entries, so that no NaN gradient comes back through them.
    shifted = jnp.where(mask, scores.astype(jnp.float32) - jnp.where(jnp.isfinite(top), top, 0.0), 0.0)
    weights = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    return (weights / jnp.where(total > 0, total, 1.0)).astype(scores.dtype)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` (..., n, d) over the True steps of `mask` (..., n); zeros where there is none. Returns (..., d)."""
    total = jnp.einsum("...nd,...n->...d", jnp.where(mask[..., None], x, 0), mask.astype(x.dtype))
    return total / jnp.maximum(jnp.sum(mask, -1), 1).astype(x.dtype)[..., None]


def masked_max(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maximum of `x` (b, n, d) over the True steps of `mask` (b, n): (b, d) float32, zeros where there is none."""
    x = x.astype(jnp.float32)
    # Not `jnp.max`: its gradient is divided by how many steps equal the maximum, and programs that compute x twice and
    # round it differently find none.
    step = jnp.argmax(jnp.where(mask[..., None], x, -jnp.inf), 1, keepdims=True)
    top = jnp.take_along_axis(x, step, 1)[:, 0]
    return jnp.where(jnp.any(mask, -1, keepdims=True), top, 0)


def causal(mask: jax.Array) -> jax.Array:
    """What each step of a sequence may attend to: itself and what precedes it, where `mask` (b, l) is True.

    Returns (b, l, l), the second axis that of the steps that attend.
    """
    return mask[:, None] & jnp.tri(mask.shape[1], dtype=bool)[None]


def stream_inputs(
    batch: Mapping[str, jax.Array], streams: Sequence[str], dtype: jnp.dtype, padded: bool = False
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The streams of a batch, zeros where nothing is real, and their masks: stream → (b, n, d) and (b, n).

    `padded` calls every step real, as systems do that know of no masks and read padding as zeros.
    """
    masks = {s: batch[f"{s}_mask"] for s in streams}
    steps = {s: jnp.where(masks[s][..., None], batch[s], 0).astype(dtype) for s in streams}
    return steps, {s: jnp.ones_like(m) for s, m in masks.items()} if padded else masks


def positions(mask: jax.Array) -> jax.Array:
    """Where each step of `mask` (b, n) stands, counted from the first real one, which is 1; 0 where it is False."""
    index = jnp.arange(mask.shape[1])[None]
    return jnp.where(mask, index - jnp.argmax(mask, -1, keepdims=True) + 1, 0)


def last_step(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The last real step of `x` (b, n, d) under `mask` (b, n): (b, d), zeros where there is none."""
    index = jnp.argmax(positions(mask), -1)[:, None, None]
    return jnp.where(jnp.any(mask, -1, keepdims=True), jnp.take_along_axis(x, index, 1)[:, 0], 0)


def align(x: jax.Array, mask: jax.Array, onto: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages a stream over the spans of time that the real steps of another take up, both filling the same clip.

    Step p of the other's m covers the steps from floor(p·n/m) up to ceil((p+1)·n/m) of the stream's n, counted from
    the first real one of each, so that padding moves nothing, no span is empty, and equal lengths map one to one.

    Args:
      x: (b, n, d); mask: (b, n).
      onto: (b, m), the other stream's mask.

    Returns:
      averages (b, m, d) and their mask (b, m): False where `onto` is, and where the whole span is masked.
    """
    source, target = positions(mask)[:, None, :], positions(onto)[:, :, None]
    length, count = jnp.max(source, -1, keepdims=True), jnp.maximum(jnp.max(target, 1, keepdims=True), 1)
    first, end = (target - 1) * length // count, -(-target * length // count)
    member = (source > first) & (source <= end) & onto[:, :, None] & mask[:, None, :]  # (b, m, n)
    total = jnp.einsum("bmn,bnd->bmd", member.astype(x.dtype), jnp.where(mask[..., None], x, 0))
    size = jnp.sum(member, -1)
    return total / jnp.maximum(size, 1).astype(x.dtype)[..., None], size > 0


def zero_masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros where `mask` (b, n) is False: (b, n, ...) → the same shape."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0)


def turns(
    batch: Mapping[str, jax.Array], streams: Sequence[str], dtype: jnp.dtype
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Averages the steps of each turn of a batch of conversations.

    A clip of no conversation is a conversation of one turn.

    Args:
      batch: `<stream>` (b, u, n, w) with `<stream>_mask` (b, u, n), and `turn_mask` (b, u): b conversation, u turn.

    Returns:
      stream → the means (b, u, w) of each turn's real steps, and which turns have the stream (b, u).
    """
    steps, masks = stream_inputs(batch, streams, dtype)
    present = {s: jnp.any(masks[s], -1) & batch["turn_mask"] for s in streams}
    return {s: masked_mean(steps[s], masks[s]) for s in streams}, present
