"""EmoAsst on RAVDESS, from action units and acoustics that others have measured, to see its cache learn new people.

Command:   python -m avjax.train --config configs/emoasst_ravdess.py --config.data.root=R
           python -m avjax.adapt --workdir runs/emoasst_ravdess --curve 1,2,4
Data:      as in `configs/ravdess_features.py`; each clip is one step of video and one of audio, so that the branches
           have nothing to attend to in time. What is said is one of two sentences, whatever the emotion.
Paper:     none.
Measured:  docs/adapt.md.
Variants:  as in `configs/emoasst_meld.py` but for its presets.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

FOLDER = module("configs/emoasst_folder.py")
RAVDESS = module("configs/ravdess_features.py")
SAID = (("01", "Kids are talking by the door"), ("02", "Dogs are sitting by the door"))
SEX = tuple((f"{actor:02d}", "male" if actor % 2 else "female") for actor in range(1, 25))


def base() -> ConfigDict:
    config, features = FOLDER.base(), RAVDESS.base()
    config.name, config.dataset, config.preset = "emoasst_ravdess", features.dataset, features.preset
    config.tables = features.tables
    config.tables.facts.transcript = {"of": "key", "pattern": r"\d\d-\d\d-\d\d-(\d\d)-.*", "names": SAID}
    config.tables.facts.gender = {"of": "key", "pattern": r".*-(\d\d)", "names": SEX}
    config.model.text_source, config.prompts.preset = "utterance", "lite"
    config.train.update(seeds=(42,), epochs=40, batch_size=128)
    return config


def get_config(variants: str = "") -> ConfigDict:
    table = {name: row for name, row in FOLDER.TABLE.items() if "preset" not in row}
    return with_variants(base(), variants, table)
