"""Pretrained encoders: one registry of families, and `load`, which gives a callable that compiles itself.

A family is a module with

    INPUTS                         how its inputs look (`base.Inputs`)
    build(config, dtype, layer)    → Flax module; its `.config` has `width`, `longest` and `steps(length)`
    convert(tensors, config)       → its params
    prepare(raw, settings)         → inputs and mask, as the original's processor makes them

and the Flax module maps (inputs, mask) → (features (b, s, d), mask (b, s)).
"""

from avjax.encoders.encoder import Encoder, pooled
from avjax.encoders.loading import FAMILIES, architecture, default_dtype, load

__all__ = ["FAMILIES", "Encoder", "architecture", "default_dtype", "load", "pooled"]
