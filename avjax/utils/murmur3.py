"""The 32-bit finaliser of MurmurHash3 (Appleby 2011), for arrays."""

import jax
import jax.numpy as jnp


def finalise(words: jax.Array) -> jax.Array:
    """Mixes the bits of each uint32 word; for masks and checksums, not for cryptography."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)
