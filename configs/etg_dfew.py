"""ETG-AVER on DFEW, seven emotions, the five official folds, on precomputed features.

Command:   python -m avjax.train --config configs/etg_dfew.py --config.data.root=DFEW
           What is not extracted yet is extracted first.
Data:      DFEW (signed agreement): Clip/original/*.mp4, EmoLabel_DataSplit/; 11,697 single-label clips. Not shipped.
Paper:     WAR 78.36, UAR 63.83 (mean of five folds; end-to-end fine-tuned encoders).
Measured:  no; the data set was not available. The settings are those of MAFW; nothing was chosen on DFEW.
Variants:  as in `configs/etg_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

MAFW = module("configs/etg_mafw.py")


def base() -> ConfigDict:
    config = MAFW.base()
    config.name, config.dataset = "etg_dfew", "dfew"
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, MAFW.TABLE)
