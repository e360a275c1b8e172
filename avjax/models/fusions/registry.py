"""All fusions by name, and their models: settings from the configuration, the rest from the registry entry."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from avjax.errors import AvjaxError
from avjax.models import avt_ca, de_iii
from avjax.models.base import Fusion, Model
from avjax.models.fusions import (
    amh,
    auxformer,
    averages,
    avtca_released,
    bc_lstm,
    c3d_lstm,
    cfn_sr,
    ladder,
    lmf,
    m2fnet,
    mag,
    mfm,
    mfn,
    misa,
    mma_dfer,
    mmer,
    mmtm,
    msaf,
    mult,
    tfn,
    three_branch,
    tmep,
    uavm,
    vavl,
)
from avjax.settings import STREAMS, FusionSettings, check_model_settings

_FILES = (
    averages,
    amh,
    lmf,
    tfn,
    mfn,
    misa,
    mfm,
    mag,
    mmtm,
    msaf,
    mult,
    auxformer,
    tmep,
    mma_dfer,
    three_branch,
    uavm,
    vavl,
    ladder,
    mmer,
    avtca_released,
    cfn_sr,
    c3d_lstm,
    bc_lstm,
    m2fnet,
    de_iii,
    avt_ca,
)
FUSIONS: dict[str, Fusion] = {name: fusion for file in _FILES for name, fusion in file.FUSIONS.items()}
_GIVEN = ("classes", "streams", "dtype", "parent", "name")


def settings(name: str) -> dict[str, Any]:
    """Returns the settings of a fusion with the paper's values: the possible keys of `model.settings`."""
    fields = [f for f in dataclasses.fields(FUSIONS[name].module) if f.name not in _GIVEN]
    return {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields}


def variants(available: tuple[str, ...] = STREAMS) -> dict[str, dict[str, Any]]:
    """Returns the fusions as variants of a configuration, by name.

    `<name>_recipe` adds the paper's optimizer, and `<name>_small` has the sizes of `Fusion.small`.

    A fusion that cannot read all `available` streams reads those of its default streams that are available; all others
    keep the streams of the configuration. A fusion that can read neither is left out.
    """
    entries = {}
    for name, fusion in FUSIONS.items():
        own = tuple(s for s in fusion.streams if s in available)
        if not (fusion.fits(available) or fusion.fits(own)):
            continue
        streams = {} if fusion.fits(available) else {"model.streams": own}
        entries[name] = {"model.name": name, "model.settings": settings(name), **streams}
        if fusion.recipe:
            entries[f"{name}_recipe"] = entries[name] | {f"train.{key}": value for key, value in fusion.recipe.items()}
        if fusion.small:
            entries[f"{name}_small"] = entries[name] | {"model.settings": settings(name) | fusion.small}
    return entries


def comparable(available: Sequence[str]) -> list[str]:
    """Returns the variants for a comparison of fusions on these streams, the small one where it exists."""
    possible = variants(tuple(available))
    return [f"{name}_small" if FUSIONS[name].small else name for name in FUSIONS if name in possible]


def model_config(name: str) -> ConfigDict:
    """Returns the `model` part of a configuration: a fusion of all three streams."""
    return ConfigDict(FusionSettings(name=name, settings=settings(name)).to_dict())


def check(given: FusionSettings) -> None:
    """Checks streams and own settings of a fusion.

    Raises:
      AvjaxError: a setting is unknown or does not fit, or the fusion cannot read the streams.
    """
    fusion, streams = FUSIONS[given.name], given.streams
    if not fusion.fits(streams):
        needed = f"{', '.join(fusion.needs)} among them" if fusion.needs else "any"
        count = f"{fusion.least} to {fusion.most}" if fusion.least < fusion.most else fusion.most
        raise AvjaxError(
            f"model.streams is {streams}; {given.name} reads {count} streams ({needed}), by default {fusion.streams}"
        )
    check_model_settings(given.settings, settings(given.name), fusion.choices)


def build(given: FusionSettings, classes: int, task: str) -> Model:
    """Builds the fusion from checked settings (`check`)."""
    fusion, streams = FUSIONS[given.name], given.streams
    module = fusion.module(classes=classes, streams=streams, dtype=jnp.dtype(given.dtype), **given.settings)
    return Model(
        module=module,
        loss=lambda output, batch, prior: fusion.loss(output, batch, task),
        heads=fusion.heads(module),
        streams=streams,
        task=task,
        turns=fusion.turns,
        # Fusions that read frames have the setting `frames`, and read them in their second stream.
        frame_stream=streams[1] if getattr(module, "frames", False) else "",
        candidates=fusion.candidates(module),
        attention_maps=fusion.attention_maps,
    )
