"""Dropout by a hash of index and key."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.utils import murmur3


class Dropout(nn.Module):
    """Zeros each value with probability `rate` in training, and divides the others by 1 − rate.

    The mask is a hash of each value's index and the key (rng "dropout") rather than drawn by JAX: cheaper to run and to
    compile, and the same for a lane alone and among others.

    Attributes:
      rate: in [0, 1); any other raises AvjaxError.
      train: whether dropout is applied.
      shared: axes along which values are dropped together.
    """

    rate: float
    train: bool
    shared: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x to the same shape."""
        if not 0 <= self.rate < 1:
            raise AvjaxError(f"a dropout is {self.rate}; give it a rate from 0 to below 1")
        if not self.train or not self.rate:
            return x
        shape = [1 if axis in self.shared else length for axis, length in enumerate(x.shape)]
        words = hashed(self.make_rng("dropout"), shape)
        return jnp.where(words >= jnp.uint32(round(self.rate * 2**32)), x / (1 - self.rate), 0)


def hashed(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Hashes each index of `shape` with both words of a key: uint32; not cryptographic."""
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for word in jax.random.key_data(key):
        index = murmur3.finalise(index ^ word)
    return index
