"""The registry of models: name → a function of (model settings, number of classes, task)."""

import inspect
import re

from avjax.errors import AvjaxError, choose
from avjax.models import emoasst, etg_aver
from avjax.models.base import Build, Model
from avjax.models.fusions import registry as fusions
from avjax.settings import EtgAverSettings, FusionSettings


def _end_to_end(settings: EtgAverSettings, classes: int, task: str) -> Model:
    # imported late: only this model needs pretrained encoders
    from avjax.models import finetune

    return finetune.build(settings, classes, task)


REGISTRY: dict[str, Build] = {
    "emoasst": emoasst.build,
    "etg_aver": etg_aver.build,
    "etg_aver_raw": _end_to_end,
} | dict.fromkeys(fusions.FUSIONS, fusions.build)


def check(settings: EtgAverSettings | FusionSettings) -> None:
    """Checks the model's name, its streams and its own settings.

    Raises:
      AvjaxError: no model has that name, or a setting does not fit it.

    Example:
      >>> check(FusionSettings(name="concat"))
    """
    choose("model.name", settings.name, sorted(REGISTRY))
    fits = isinstance(settings, EtgAverSettings) == settings.name.startswith("etg_aver")
    if not fits:
        raise AvjaxError(f"model.name is {settings.name!r}, which has other settings; choose it by a variant")
    if settings.name == "emoasst":
        emoasst.check(settings)
    elif settings.name in fusions.FUSIONS:
        fusions.check(settings)


def meanings(name: str) -> dict[str, str]:
    """Returns descriptions of the settings of a fusion or of EmoAsst, from the docstring of its module.

    Example:
      >>> meanings("mult")["out_dropout"]
      'in the last perceptron'
    """
    module = emoasst.EmoAsst if name == "emoasst" else fusions.FUSIONS[name].module
    listed = (inspect.getdoc(module) or "").partition("Attributes:")[2]
    text = " ".join(listed.split())
    # "width, heads: of all layers; dropout: a rate" names three settings in two pieces.
    pieces = re.findall(r"(?:^|[.;] )((?:[a-z_]+, )*[a-z_]+): (.*?)(?=[.;] (?:[a-z_]+, )*[a-z_]+: |$)", text)
    return {key: meaning.rstrip(".") for keys, meaning in pieces for key in keys.split(", ")}


def build(settings: EtgAverSettings | FusionSettings, classes: int, task: str = "single") -> Model:
    """Builds the model of `settings` for `classes` classes, labels or targets of a task.

    Raises:
      AvjaxError: as `check`, or a setting does not fit the task.

    Example:
      >>> model = build(FusionSettings(name="concat", streams=("audio", "video")), 7)
      >>> model.prediction_heads
      ('fusion',)
    """
    check(settings)
    return REGISTRY[settings.name](settings, classes, task)
