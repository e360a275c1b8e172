"""AVT-CA on CREMA-D, six intended emotions, from raw face images and MFCC, the five blocks of actors of HiCMAE.

Command:   python -m avjax.train --config configs/avtca_crema_d.py --config.data.root=CREMA-D
Data:      CREMA-D as it was downloaded (VideoFlash/*.flv, AudioWAV/*.wav; ODbL): 7,437 clips of 91 actors. Not shipped.
Paper:     accuracy 94.13, F1 94.67 (Table IV): figures of validation, as in `configs/avtca_ravdess.py`.
Measured:  no; the videos were not available.
Variants:  as in `configs/avtca_ravdess.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

RAVDESS = module("configs/avtca_ravdess.py")


def base() -> ConfigDict:
    config = RAVDESS.base()
    config.name, config.dataset = "avtca_crema_d", "crema_d"
    config.protocol.update(folds="given")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, RAVDESS.TABLE)
