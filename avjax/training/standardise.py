"""Mean and standard deviation of features over the clips that count, by group."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

# A dimension that hardly moves is not blown up to unit variance: features are kept at a natural scale of order 1.
STD_FLOOR = 1e-2


def statistics(
    x: jax.Array, mask: jax.Array, group: jax.Array, counted: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Computes mean and standard deviation over the valid steps of the counted clips, by group.

    A step with a non-finite value is left out: it makes only its own clip's loss non-finite, and the error names that
    clip.

    Args:
      x: (clips, n, d).
      mask: (clips, n).
      group: (clips,) integers.
      counted: (clips,), above 0 for clips that count.
      groups: number of groups.

    Returns:
      mean and std, (groups, d); a group without a valid step has mean 0 and std 1.
    """
    total, added = sums(x, mask, group, counted, groups)
    mean = average(total, added)
    # Two passes: the one-pass formula loses all digits where the mean is large against the spread.
    return mean_and_std(total, mean, sums(x, mask, group, counted, groups, mean)[1])


def average(total: jax.Array, added: jax.Array) -> jax.Array:
    """Returns the mean of `total (groups, 1)` steps with the sum `added (groups, d)`; 0 for no steps."""
    return added / jnp.maximum(total, 1.0)


def mean_and_std(total: jax.Array, mean: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the result of `statistics` from the sums of both passes."""
    std = jnp.maximum(jnp.sqrt(average(total, squares)), STD_FLOOR)
    return jnp.where(total > 0, mean, 0.0), jnp.where(total > 0, std, 1.0)


def sums(
    x: jax.Array, mask: jax.Array, group: jax.Array, counted: jax.Array, groups: int, mean: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums the steps that count in `statistics`, by group: their number (groups, 1), and their values (groups, d).

    Given their `mean (groups, d)`, sums squared deviations from it instead of values.
    """
    counts = mask & (counted > 0)[:, None] & jnp.all(jnp.isfinite(x), -1)  # (clips, n)
    weight = counts.astype(jnp.float32)
    x = jnp.where(counts[..., None], x, 0)  # a square that overflows is not silenced by a weight of 0
    if mean is not None:
        x = jnp.square(x - mean[group][:, None, :])
    add = lambda v: jax.ops.segment_sum(v, group, groups)  # noqa: E731
    return add(jnp.sum(weight, -1))[:, None], add(jnp.einsum("cnd,cn->cd", x, weight))


Statistics = Mapping[str, tuple[jax.Array, jax.Array]]
