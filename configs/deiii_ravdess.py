"""DE-III on RAVDESS, eight emotions, five folds of disjoint actors.

Command:   python -m avjax.train --config configs/deiii_ravdess.py --config.data.root=RAVDESS
Data:      RAVDESS as it was downloaded (Actor_01/*.mp4; CC BY-NC-SA 4.0): the 1,440 clips of speech with video and
           audio. The paper's 2,880 count copies without audio beside them. Not shipped.
Paper:     accuracy 82.7 (Table 1).
Measured:  no; the videos were not available. DE-III's fusion on features that were: docs/comparison.md.
Variants:  as in `configs/deiii_crema_d.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

CREMA_D = module("configs/deiii_crema_d.py")


def base() -> ConfigDict:
    config = CREMA_D.base()
    config.name, config.dataset = "deiii_ravdess", "ravdess"
    config.protocol.update(folds="speaker")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, CREMA_D.TABLE)
