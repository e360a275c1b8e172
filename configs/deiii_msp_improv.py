"""DE-III on MSP-IMPROV: valence, arousal and dominance by concordance correlation, five folds of disjoint actors.

Command:   python -m avjax.train --config configs/deiii_msp_improv.py --config.data.root=R --config.data.features=F
Data:      MSP-IMPROV (signed agreement): 8,385 clips of 12 actors. R is a folder with a labels.csv: file, speaker,
           value:valence, value:arousal, value:dominance, each on [0, 1]: (x - 1) / 4 of its scale of 1 to 5, arousal
           turned round, since it is stored flipped. Not shipped.
Paper:     CCC V 89.3, A 88.7, D 85.8 (Table 1).
Here:      not measured: the data set was not at hand. A planted relation is recovered: tests/test_regression.py.
Variants:  as in `configs/deiii_crema_d.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

CREMA_D = module("configs/deiii_crema_d.py")


def base() -> ConfigDict:
    config = CREMA_D.base()
    config.name, config.dataset = "deiii_msp_improv", "folder"
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, CREMA_D.TABLE)
