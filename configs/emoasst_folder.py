"""EmoAsst on any folder of clips with a `labels.csv`, at sizes for a few hundred of them.

Command:   python -m avjax.train --config configs/emoasst_folder.py --config.data.root=R --config.data.features=F
Data:      yours. With speakers: leave one speaker out (groups of speakers when there are many); else stratified folds.
           Columns `speaker`, `gender` and `transcript` enter the prompts.
Result:    docs/models/emoasst.md, on 96 real clips.
Variants:  as in `configs/emoasst_meld.py`, but label_free_query is the default; `paper`: its widths, label_in_query;
           features: `lite` (default), `open`, or `emoasst`, which the hub has.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models import emoasst

MELD = module("configs/emoasst_meld.py")
TABLE = MELD.TABLE | {"paper": {f"model.settings.{k}": v for k, v in emoasst.settings().items()}}


def base() -> ConfigDict:
    config = MELD.base()
    # The sentence speaks for clips without a transcript, and quotes one where it is.
    config.name, config.dataset, config.model.text_source = "emoasst_folder", "folder", "both"
    # A query that has the label in training teaches the video branch to copy it (docs/models/emoasst.md).
    config.update_from_flattened_dict(MELD.TABLE["lite"] | MELD.TABLE["small"] | MELD.TABLE["label_free_query"])
    config.protocol.update(fold_count=10, validation=0.2)
    config.train.update(seeds=(42, 43, 44), epochs=60, batch_size=32)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
