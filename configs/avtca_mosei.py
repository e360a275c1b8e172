"""AVT-CA on CMU-MOSEI: six emotions, multi-label, the official parts.

Command:   python -m avjax.train --config configs/avtca_mosei.py --config.data.root=R --config.data.features=F
Data:      CMU-MOSEI, cut into utterances. R is a folder with a labels.csv: file, split (train, val, test), start, end
           where a film is not cut, is:happy, is:sad, is:anger, is:fear, is:disgust, is:surprise (1 where the emotion
           is above 0). Not shipped.
Paper:     accuracy 95.84, F1 94.13 (Table III), over one class of six per utterance, and of validation.
Measured:  no; the data set was not available. Another task than the paper's: the corpus marks several emotions
           in one utterance. Selected and reported by weighted accuracy and F1, means over the six.
Variants:  as in `configs/avtca_ravdess.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

RAVDESS = module("configs/avtca_ravdess.py")


def base() -> ConfigDict:
    config = RAVDESS.base()
    config.name, config.dataset = "avtca_mosei", "folder"
    config.protocol.update(folds="given")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, RAVDESS.TABLE)
