"""ETG-AVER on any folder of clips with a `labels.csv` (`file,label[,speaker][,split|fold][,transcript]`).

Command:   python -m avjax.extract --config configs/extract_folder.py --config.data.root=R --out F
           python -m avjax.train --config configs/etg_folder.py --config.data.features=F --workdir W
Data:      yours. With speakers: leave one speaker out (groups of speakers when there are many); else stratified folds.
Result:    docs/results.md, on 96 real clips.
Variants:  as in `configs/etg_mafw.py`; finetune, lora: five epochs, no dropout, the core at 1e-3. Without the hub, on a
           laptop: `finetune,open_raw`, `lora,open_raw`, and `--config.train.accumulate=4` for memory.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

MAFW = module("configs/etg_mafw.py")
# Of few clips a core that begins from nothing learns nothing at the encoders' rates: so it keeps its own.
_TUNED = {"train.epochs": 5, "model.dropout": 0.0}
TABLE = MAFW.TABLE | {
    "finetune": MAFW.TABLE["finetune"] | _TUNED | {"train.rates": (("^core/", 100.0),)},
    "lora": MAFW.TABLE["lora"] | _TUNED | {"train.rates": (("^core/", 10.0),)},
}


def base() -> ConfigDict:
    config = MAFW.base()
    config.name, config.dataset = "etg_folder", "folder"
    # Such sets are small. Chosen on held-out training speakers of four-speaker clips (docs/results.md), never on test.
    config.model.update(dropout=0.5)
    config.train.update(seeds=(42, 43, 44), epochs=30, batch_size=16, learning_rate=1e-3, weight_decay=0.1)
    config.protocol.update(fold_count=10, validation=0.2)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
