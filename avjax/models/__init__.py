"""The registry of models: name → a function of (model configuration, number of classes, task)."""

from typing import Any

from avjax.errors import AvjaxError
from avjax.models import emoasst, etg_aver
from avjax.models.base import Build, Model
from avjax.models.fusions import registry as fusions


def _end_to_end(config: Any, classes: int, task: str) -> Model:
    # Models know arrays; this one brings pretrained encoders, which know files.
    from avjax.models import finetune

    return finetune.build(config, classes, task)


REGISTRY: dict[str, Build] = {
    "emoasst": emoasst.build,
    "etg_aver": etg_aver.build,
    "etg_aver_raw": _end_to_end,
} | dict.fromkeys(fusions.FUSIONS, fusions.build)


def build(config: Any, classes: int, task: str = "single") -> Model:
    """Builds `config.name` with `config`'s settings for `classes` classes, labels or values of a kind of task.

    Raises:
      AvjaxError: no model has that name.
    """
    if config.name not in REGISTRY:
        raise AvjaxError(f"model.name is {config.name!r}; the registry has {', '.join(sorted(REGISTRY))}")
    return REGISTRY[config.name](config, classes, task)
