"""AVT-CA on any folder of clips with a `labels.csv`, from raw face images of 112 x 112 and MFCC.

Command:   python -m avjax.train --config configs/avtca_folder.py --config.data.root=R --config.data.features=F
Data:      yours. With speakers: leave one speaker out (groups of speakers when there are many); else stratified folds.
Result:    docs/results.md, on 96 real clips.
Variants:  as in `configs/avtca_ravdess.py`; avtca: images of 224 x 224; paper: the paper's optimizer.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

RAVDESS = module("configs/avtca_ravdess.py")
ETG = module("configs/etg_folder.py")
TABLE = RAVDESS.TABLE | {
    "avtca": {"preset": "avtca"},
    "paper": {f"train.{key}": value for key, value in RAVDESS.ENTRY.recipe.items()},
}


def base() -> ConfigDict:
    config = RAVDESS.base()
    train = ETG.base().train
    config.name, config.dataset, config.preset = "avtca_folder", "folder", "avtca_112"
    config.train.update(train)
    config.train.update(epochs_per_call=1)
    config.protocol = ETG.base().protocol
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
