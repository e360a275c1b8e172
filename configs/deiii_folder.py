"""DE-III on any folder of clips with a `labels.csv`, at sizes for a few hundred of them.

Command:   python -m avjax.train --config configs/deiii_folder.py --config.data.root=R --config.data.features=F
Data:      yours. With speakers: leave one speaker out (groups of speakers when there are many); else stratified folds.
Result:    docs/results.md, on 96 real clips.
Variants:  as in `configs/deiii_crema_d.py`; `paper` for the paper's sizes and optimizer; `concat`: the concatenation of
           the same streams. Features: `deiii_lite` (default), `deiii_open`, and what the hub has, `deiii`, `flow_dis`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models import de_iii
from avjax.models.fusions import registry as fusions

CREMA_D = module("configs/deiii_crema_d.py")
ETG = module("configs/etg_folder.py")
RECIPE = {f"train.{key}": value for key, value in CREMA_D.ENTRY.recipe.items()}
TABLE = CREMA_D.TABLE | {
    "paper": {"model.settings": fusions.settings("de_iii"), **RECIPE},
    "concat": {
        "model.name": "concat",
        "model.settings": fusions.settings("concat"),
        "model.streams": ("audio", "video"),
    },
}


def base() -> ConfigDict:
    config = ETG.base()
    config.name, config.preset = "deiii_folder", "deiii_lite"
    config.model = fusions.model_config("de_iii")
    config.model.update(streams=de_iii.DeIII.streams, text_source="", settings=CREMA_D.ENTRY.small)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
