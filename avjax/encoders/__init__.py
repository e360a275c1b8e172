"""Pretrained encoders: a registry of families, and `load`, which returns a callable that compiles itself.

A family is a module with

    INPUTS                         shape and kind of its inputs (`base.Inputs`)
    build(config, dtype, layer)    → Flax module; its `.config` has `width`, `longest` and `steps(length)`
    convert(tensors, config)       → its params
    prepare(raw, settings)         → inputs and mask, equal to those of the original's processor

and the Flax module maps (inputs, mask) → (features (b, s, d), mask (b, s)).
"""

from avjax.encoders.encoder import Encoder, pooled
from avjax.encoders.loading import FAMILIES, architecture, default_dtype, load

__all__ = ["FAMILIES", "Encoder", "architecture", "default_dtype", "load", "pooled"]
