"""Every fusion of feature sequences on any folder of clips with a `labels.csv`, as `configs/etg_folder.py` has it.

Command:   python -m avjax.train --config configs/fusion_folder.py:mult --config.data.features=F
           python -m avjax.evaluate compare --config configs/fusion_folder.py --config.data.features=F
Data:      yours. With speakers: leave one speaker out (groups of speakers when there are many); else stratified folds.
Result:    docs/comparison.md, on 96 real clips.
Variants:  as in `configs/fusion_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

FUSION = module("configs/fusion_mafw.py")
ETG = module("configs/etg_folder.py")


def base() -> ConfigDict:
    config = ETG.base()
    config.name = "fusion_folder"
    config.model = FUSION.base().model
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, FUSION.TABLE)
