"""Every fusion of feature sequences on MAFW, eleven single emotions, the five official folds.

Command:   python -m avjax.train --config configs/fusion_mafw.py:mult [--config.data.root=MAFW]
           python -m avjax.evaluate compare --config configs/fusion_mafw.py --rows concat,mult,misa
           Without MAFW the demo corpus stands in, as in `configs/etg_mafw.py`, and every figure is marked with it.
Data:      as in `configs/etg_mafw.py`.
Result:    not measured: the data set was not available. Fusions on data that were available: docs/comparison.md.
Variants:  a fusion by its name (`avjax.models.fusions.registry.FUSIONS`), with its settings under `model.settings`, and
its
           losses and modality dropout as its paper has them; the optimizer is this file's for all of them, and the
           paper's in <name>_recipe. Then streams (`audio`, `video`, `text`, `ta`, `tv`, `av`, `tav`), protocols and
           presets as in `configs/etg_mafw.py`: `configs/fusion_mafw.py:mult,av,speaker_norm`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.fusions import registry as fusions

MAFW = module("configs/etg_mafw.py")

STREAMS = {
    "audio": {"model.streams": ("audio",)},
    "video": {"model.streams": ("video",)},
    "text": {"model.streams": ("text",)},
    "ta": {"model.streams": ("text", "audio")},
    "tv": {"model.streams": ("text", "video")},
    "av": {"model.streams": ("audio", "video")},
    "tav": {"model.streams": ("text", "audio", "video")},
}
FUSIONS = fusions.variants()
TABLE = FUSIONS | STREAMS | MAFW.PROTOCOLS | module("configs/extract_mafw.py").PRESETS


def base() -> ConfigDict:
    config = MAFW.base()
    config.name = "fusion_mafw"
    config.model = fusions.model_config("concat")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
