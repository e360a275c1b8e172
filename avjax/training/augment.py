"""Augmentation of raw frames on the device: horizontal flips and small rotations, the same for all frames of a clip.

Shapes: b clip, t frame, h row, w column, p pixel (row and column) of a frame.
"""

import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError


def augment(frames: jax.Array, key: jax.Array, *, degrees: float = 10.0, flip: float = 0.5) -> jax.Array:
    """Flips and rotates each clip as a whole; the draw of a clip depends on the key and its row, not on other clips.

    Frames are rotated about their centre with bilinear interpolation, and are zero (black) beyond their border.

    Args:
      frames: (b, t, h, w, 3) uint8.
      key: of `jax.random`.
      degrees: each clip's angle is uniform within ± this; positive angles turn the content counter-clockwise.
      flip: probability that a clip is mirrored left to right.

    Returns:
      (b, t, h, w, 3) uint8, rounded.

    Raises:
      AvjaxError: frames are of another shape or type.
    """
    if frames.ndim != 5 or frames.dtype != jnp.uint8:
        raise AvjaxError(
            f"frames to augment are {frames.dtype} of shape {frames.shape}; "
            "expected uint8 images (clip, frame, row, column, 3), as they are before a model scales them"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(frames.shape[0]))
    angles, flips = jax.vmap(lambda one: _draw(one, degrees, flip))(keys)
    return jax.vmap(_moved)(frames, jnp.deg2rad(angles), flips)


def _draw(key: jax.Array, degrees: float, flip: float) -> tuple[jax.Array, jax.Array]:
    turn, mirror = jax.random.split(key)
    return jax.random.uniform(turn, minval=-degrees, maxval=degrees), jax.random.bernoulli(mirror, flip)


def _moved(clip: jax.Array, angle: jax.Array, flip: jax.Array) -> jax.Array:
    """Returns a clip (t, h, w, 3) mirrored if `flip`, then rotated by `angle` in radians.

    The source pixels are computed once and used for all frames together.
    """
    t, h, w, channels = clip.shape
    pixels = jnp.moveaxis(clip, 0, 2).reshape(h * w, t * channels)
    index, weight = _sources(h, w, angle, flip)
    moved = sum(weight[i][:, None] * pixels[index[i]].astype(jnp.float32) for i in range(4))  # p t·3
    return jnp.moveaxis(jnp.round(moved).astype(clip.dtype).reshape(h, w, t, channels), 2, 0)


def _sources(h: int, w: int, angle: jax.Array, flip: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns indices and weights, (4, p) each, of the four source pixels of each pixel; weight 0 beyond the frame."""
    middle = ((h - 1) / 2, (w - 1) / 2)
    row, column = (grid.reshape(-1) for grid in jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"))
    down, right = row - middle[0], column - middle[1]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    y = cosine * down + sine * right + middle[0]
    x = cosine * right - sine * down + middle[1]
    x = jnp.where(flip, w - 1 - x, x)
    (rows, row_weight), (columns, column_weight) = _neighbours(y, h), _neighbours(x, w)
    index = rows[:, None] * w + columns[None]
    return index.reshape(4, -1), (row_weight[:, None] * column_weight[None]).reshape(4, -1)


def _neighbours(at: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the two integer positions (2, p) around each of `at` (p,), and their weights, 0 outside [0, size)."""
    both = jnp.floor(at)[None] + jnp.array([0.0, 1.0])[:, None]  # 2 p
    inside = (both >= 0) & (both < size)
    return jnp.clip(both, 0, size - 1).astype(jnp.int32), jnp.where(inside, 1 - jnp.abs(at[None] - both), 0)
