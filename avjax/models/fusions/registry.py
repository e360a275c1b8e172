"""All fusions by name, and how one becomes a model: settings from the configuration, the rest from its entry."""

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
STREAMS = ("text", "audio", "video")
DTYPES = ("float32", "bfloat16")
_GIVEN = ("classes", "streams", "dtype", "parent", "name")


def settings(name: str) -> dict[str, Any]:
    """The settings of a fusion with the paper's values: what `model.settings` of a configuration may hold."""
    fields = [f for f in dataclasses.fields(FUSIONS[name].module) if f.name not in _GIVEN]
    return {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields}


def variants(there: tuple[str, ...] = STREAMS) -> dict[str, dict[str, Any]]:
    """The fusions as variants of a configuration, by name.

    Beside them `<name>_recipe` with the paper's optimizer, and `<name>_small` with the sizes of `Fusion.small`.

    A fusion that cannot read all streams that are `there` takes its own of them; all others keep those of the
    configuration. One for which these do not do is no variant.
    """
    out = {}
    for name, fusion in FUSIONS.items():
        own = tuple(s for s in fusion.streams if s in there)
        if not (fusion.fits(there) or fusion.fits(own)):
            continue
        streams = {} if fusion.fits(there) else {"model.streams": own}
        out[name] = {"model.name": name, "model.settings": settings(name), **streams}
        if fusion.recipe:
            out[f"{name}_recipe"] = out[name] | {f"train.{key}": value for key, value in fusion.recipe.items()}
        if fusion.small:
            out[f"{name}_small"] = out[name] | {"model.settings": settings(name) | fusion.small}
    return out


def comparable(there: Sequence[str]) -> list[str]:
    """The fusions that a comparison on these streams shows, by variant: the small one where there is one."""
    possible = variants(tuple(there))
    return [f"{name}_small" if FUSIONS[name].small else name for name in FUSIONS if name in possible]


def model_config(name: str) -> ConfigDict:
    """The `model` part of a configuration: a fusion of all three streams."""
    return ConfigDict(
        {
            "name": name,
            "streams": STREAMS,
            "text_source": "both",  # both | audio | video | constant
            "settings": settings(name),
            "dtype": "float32",
        }
    )


def build(config: Any, classes: int, task: str) -> Model:
    """Makes the fusion of `config` (the `model` part of a configuration).

    Raises:
      AvjaxError: a setting is unknown, or the fusion cannot read the streams.
    """
    if config.dtype not in DTYPES:
        raise AvjaxError(f"model.dtype is {config.dtype!r}; choose one of {', '.join(DTYPES)}")
    fusion, streams = FUSIONS[config.name], tuple(config.streams)
    if not fusion.fits(streams):
        needed = f"{', '.join(fusion.needs)} among them" if fusion.needs else "any"
        count = f"{fusion.least} to {fusion.most}" if fusion.least < fusion.most else fusion.most
        raise AvjaxError(
            f"model.streams is {streams}; {config.name} reads {count} streams ({needed}), "
            f"{fusion.streams} unless told otherwise"
        )
    given = config.settings.to_dict() if isinstance(config.settings, ConfigDict) else dict(config.settings)
    if unknown := given.keys() - settings(config.name).keys():
        raise AvjaxError(
            f"model.settings has {', '.join(sorted(unknown))}; {config.name} has {', '.join(settings(config.name))}"
        )
    module = fusion.module(classes=classes, streams=streams, dtype=jnp.dtype(config.dtype), **given)
    return Model(
        module=module,
        loss=lambda output, batch, prior: fusion.loss(output, batch, task),
        heads=fusion.heads(module),
        streams=streams,
        task=task,
        turns=fusion.turns,
        # Those that read pictures say so in a setting, and read them in their second stream.
        pictures=streams[1] if getattr(module, "frames", False) else "",
        candidates=fusion.candidates(module),
        pictured=fusion.pictured,
    )
