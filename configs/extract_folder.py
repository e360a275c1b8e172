"""Features and sentences of any folder of clips with a `labels.csv`.

Command:   python -m avjax.extract --config configs/extract_folder.py --config.data.root=R --out F
Data:      R/labels.csv with the columns file, label and, if you have them, speaker, split or fold, transcript.
Variants:  as in `configs/extract_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

MAFW = module("configs/extract_mafw.py")


def base() -> ConfigDict:
    config = MAFW.base()
    config.name, config.dataset = "extract_folder", "folder"
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, MAFW.PRESETS | MAFW.TABLE_4)
