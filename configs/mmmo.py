"""ICT-MMMO, reviews on video, liked or not, on the sequences of the Memory Fusion Network; official three parts.

Command:   python -m avjax.train --config configs/mmmo.py:av --config.data.root=R
Data:      R/mmmo: COVAREP (74) and FACET (36) at 20 steps, one for each word; 220, 40 and 80 videos (Zadeh et al., AAAI
           2018; MIT). Words of the training part are not to be had, so there is no text. Not shipped.
           A step of zeros alone is none. Of the audio's 6 % they stand before the first and after the last word, and
           the words' own vectors are zeros there, too: padding. The video has them there and, at another 12 %, in
           between, where no face was found.
           Speakers are not named and each has one video, so there is no standardisation by speaker.
Published: Memory Fusion Network, with words: .738 (accuracy; liked = 3.5 and more of 5).
Measured:  yardstick, a conventional model on audio and video: .7625. The logistic regression that each run prints is
           too weakly regularised for 220 clips: .6375. Fusions: .64 to .754, mfn_small .654 (docs/comparison.md). 80
           test clips: one is .0125.
Variants:  audio, video, av: which streams enter; fusions by name and all_clips: as in
           `configs/fusion_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.fusions import registry as fusions

FUSION = module("configs/fusion_mafw.py")

TABLES = {
    "files": {
        "audio": {"path": "mmmo/audio_{split}.h5", "padding": "zeros"},
        "video": {"path": "mmmo/video_{split}.h5", "padding": "zeros"},
        "rating": {"path": "mmmo/y_{split}.h5"},
    },
    "streams": {"audio": ("audio:d1",), "video": ("video:d1",)},
    "facts": {"label": {"of": "rating:d1", "at_least": 3.5, "names": (("0", "negative"), ("1", "positive"))}},
    "splits": (("train", "train"), ("valid", "val"), ("test", "test")),
}
VARIANTS = {
    "audio": {"model.streams": ("audio",)},
    "video": {"model.streams": ("video",)},
    "av": {"model.streams": ("audio", "video")},
    "all_clips": FUSION.MAFW.PROTOCOLS["all_clips"],
}


def base() -> ConfigDict:
    config = FUSION.base()
    config.name, config.dataset, config.preset = "mmmo", "mmmo", "tables"
    config.tables = ConfigDict(TABLES)
    config.model.update(streams=("audio", "video"), text_source="")
    config.train.update(seeds=(42, 43, 44), batch_size=16)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, VARIANTS | fusions.variants(("audio", "video")))
