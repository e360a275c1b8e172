"""Masked pooling and alignment of sequences.

Masks are boolean, True = real. Over an empty set every function gives zeros, never NaN, and masked values never reach
the result, so that padding and batch neighbours cannot change a prediction. Softmax runs in float32.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the softmax over the last axis of `scores` among True entries of `mask`; zeros where there is none.

    Args:
      scores: (..., n).
      mask: broadcastable to `scores`.

    Returns:
      (..., n) in the dtype of `scores`; each row sums to 1, or to 0 where its mask is empty.

    Example:
      >>> masked_softmax(jnp.zeros(3), jnp.array([True, True, False])).tolist()
      [0.5, 0.5, 0.0]
    """
    mask = jnp.broadcast_to(mask, scores.shape)
    kept = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(kept, -1, keepdims=True))
    # The inner `where` keeps exp finite at False entries, so that no NaN gradient flows through them.
    shifted = jnp.where(mask, scores.astype(jnp.float32) - jnp.where(jnp.isfinite(top), top, 0.0), 0.0)
    weights = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    return (weights / jnp.where(total > 0, total, 1.0)).astype(scores.dtype)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages `x` (..., n, d) over the True steps of `mask` (..., n): (..., d), zeros where there is none.

    Example:
      >>> masked_mean(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False])).tolist()
      [2.0]
    """
    total = jnp.einsum("...nd,...n->...d", jnp.where(mask[..., None], x, 0), mask.astype(x.dtype))
    return total / jnp.maximum(jnp.sum(mask, -1), 1).astype(x.dtype)[..., None]


def masked_max(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the maximum of `x` (b, n, d) over the True steps of `mask` (b, n): (b, d) float32, zeros for none.

    Example:
      >>> masked_max(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
      [[3.0]]
    """
    x = x.astype(jnp.float32)
    # Not `jnp.max`: its gradient is divided by the number of steps that equal the maximum, which is 0 in programs that
    # compute x twice with different rounding.
    step = jnp.argmax(jnp.where(mask[..., None], x, -jnp.inf), 1, keepdims=True)
    top = jnp.take_along_axis(x, step, 1)[:, 0]
    return jnp.where(jnp.any(mask, -1, keepdims=True), top, 0)


def causal(mask: jax.Array) -> jax.Array:
    """Returns the causal mask (b, l, l), queries first, of `mask` (b, l): real steps up to the query's own.

    Example:
      >>> causal(jnp.array([[True, True]])).tolist()
      [[[True, False], [True, True]]]
    """
    return mask[:, None] & jnp.tri(mask.shape[1], dtype=bool)[None]


def stream_inputs(
    batch: Mapping[str, jax.Array], streams: Sequence[str], dtype: jnp.dtype, padded: bool = False
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the streams of a batch, zeros where masked, and their masks: stream → (b, n, d) and (b, n).

    `padded` marks every step as real, like systems without masks, which read padding as zeros.

    Example:
      >>> batch = {"audio": jnp.ones((1, 2, 1)), "audio_mask": jnp.array([[True, False]])}
      >>> stream_inputs(batch, ["audio"], jnp.float32)[0]["audio"].ravel().tolist()
      [1.0, 0.0]
    """
    masks = {s: batch[f"{s}_mask"] for s in streams}
    steps = {s: jnp.where(masks[s][..., None], batch[s], 0).astype(dtype) for s in streams}
    return steps, {s: jnp.ones_like(m) for s, m in masks.items()} if padded else masks


def positions(mask: jax.Array) -> jax.Array:
    """Returns the position of each step of `mask` (b, n), counted from 1 at the first real step; 0 where False.

    Example:
      >>> positions(jnp.array([[False, True, True]])).tolist()
      [[0, 1, 2]]
    """
    index = jnp.arange(mask.shape[1])[None]
    return jnp.where(mask, index - jnp.argmax(mask, -1, keepdims=True) + 1, 0)


def last_step(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the last real step of `x` (b, n, d) under `mask` (b, n): (b, d), zeros where there is none.

    Example:
      >>> last_step(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
      [[3.0]]
    """
    index = jnp.argmax(positions(mask), -1)[:, None, None]
    return jnp.where(jnp.any(mask, -1, keepdims=True), jnp.take_along_axis(x, index, 1)[:, 0], 0)


def align(x: jax.Array, mask: jax.Array, onto: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages a stream over the time spans of another stream's real steps, both filling the same clip.

    Step p of the other's m covers steps floor(p·n/m) up to ceil((p+1)·n/m) of the stream's n, counted from the first
    real step of each. So padding has no effect, no span is empty, and equal lengths map one to one.

    Args:
      x: (b, n, d).
      mask: (b, n).
      onto: (b, m), the other stream's mask.

    Returns:
      Averages (b, m, d) and their mask (b, m): False where `onto` is, and where the whole span is masked.

    Example:
      >>> x, mask, onto = jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((1, 4), bool), jnp.ones((1, 2), bool)
      >>> align(x, mask, onto)[0].ravel().tolist()
      [0.5, 2.5]
    """
    source, target = positions(mask)[:, None, :], positions(onto)[:, :, None]
    length, count = jnp.max(source, -1, keepdims=True), jnp.maximum(jnp.max(target, 1, keepdims=True), 1)
    first, end = (target - 1) * length // count, -(-target * length // count)
    member = (source > first) & (source <= end) & onto[:, :, None] & mask[:, None, :]  # (b, m, n)
    total = jnp.einsum("bmn,bnd->bmd", member.astype(x.dtype), jnp.where(mask[..., None], x, 0))
    size = jnp.sum(member, -1)
    return total / jnp.maximum(size, 1).astype(x.dtype)[..., None], size > 0


def zero_masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Sets x to zero where `mask` (b, n) is False: (b, n, ...) → the same shape.

    Example:
      >>> zero_masked(jnp.ones((1, 2, 1)), jnp.array([[True, False]])).tolist()
      [[[1.0], [0.0]]]
    """
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0)


def turns(
    batch: Mapping[str, jax.Array], streams: Sequence[str], dtype: jnp.dtype
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Averages the steps of each turn of a batch of conversations.

    A clip outside any conversation is a conversation of one turn.

    Args:
      batch: `<stream>` (b, u, n, w) with `<stream>_mask` (b, u, n), and `turn_mask` (b, u): b conversation, u turn.
      streams: the streams to average.
      dtype: of the averages.

    Returns:
      Stream → the means (b, u, w) of each turn's real steps, and which turns have the stream (b, u).

    Example:
      >>> batch = {"audio": jnp.ones((1, 2, 3, 1)), "audio_mask": jnp.ones((1, 2, 3), bool)}
      >>> batch["turn_mask"] = jnp.ones((1, 2), bool)
      >>> turns(batch, ["audio"], jnp.float32)[0]["audio"].shape
      (1, 2, 1)
    """
    steps, masks = stream_inputs(batch, streams, dtype)
    present = {s: jnp.any(masks[s], -1) & batch["turn_mask"] for s in streams}
    return {s: masked_mean(steps[s], masks[s]) for s in streams}, present
