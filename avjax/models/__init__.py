"""The registry of models: name → a function of (model configuration, number of classes)."""

from typing import Any

from avjax.errors import AvjaxError
from avjax.models import etg_aver, fusions
from avjax.models.base import Build, Model

REGISTRY: dict[str, Build] = {"etg_aver": etg_aver.build} | dict.fromkeys(fusions.FUSIONS, fusions.build)


def build(config: Any, classes: int) -> Model:
    """Builds `config.name` with `config`'s settings for `classes` classes.

    Raises:
      AvjaxError: no model has that name.
    """
    if config.name not in REGISTRY:
        raise AvjaxError(f"model.name is {config.name!r}; the registry has {', '.join(sorted(REGISTRY))}")
    return REGISTRY[config.name](config, classes)
