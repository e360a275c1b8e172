"""CMU-MOSEI, sentiment from −3 to 3, on the features that MMSA publishes; the official three parts.

Command:   python -m avjax.train --config configs/mosei.py --config.data.root=R
Data:      R/aligned_50.pkl (unaligned: R/unaligned_50.pkl) of MMSA (Mao et al. 2022): text BERT 768, audio COVAREP 74,
           video Facet 35 numbers at up to 50 steps (unaligned: 500 of audio and video); 16,326, 1,871 and 4,659
           utterances. Not shipped. Pickles are read by `avjax.utils.safe_pickle`: nothing in them runs.
           emotions: R has the files of the CMU Multimodal SDK that `avjax/features/tables/mosei.py` names: text GloVe
           300, audio COVAREP 74, video Facet 35 (or OpenFace 713) numbers, and its cmu_mosei_std_folds.py.
           A step of zeros alone is none; what is no finite number (COVAREP has −inf) is 0. A dialogue is a video. Its
           speaker is not named, so there is no standardisation by speaker.
Published: MMSA's table, nine models on these files: accuracy of two .740 to .819 with 0, .786 to .849 without; of seven
           .505 to .544; mean absolute error .593 to .535; correlation .689 to .759 (EF-LSTM to Self-MM).
Measured:  no; the data set was not available. metrics.json has all of these under `sentiment`; runs are chosen
           and compared by CCC. Of emotions: weighted accuracy and F1, for each and their means.
Variants:  unaligned; emotions: six emotions, multi-label (above 0), data set `mosei`; audio, video, text, av, tav:
           which streams enter; fusions by name and all_clips: as in `configs/fusion_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants

FUSION = module("configs/fusion_mafw.py")

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
SENTIMENT = (("sentiment", {"of": "utterances:regression_labels"}),)
TABLES = {
    "files": {
        "utterances": {
            "path": "aligned_50.pkl",
            "format": "mmsa",
            "key": "id",
            "padding": "zeros",
            "missing": "zeros",
            "lengths": (),
        }
    },
    "streams": {"text": ("utterances:text",), "audio": ("utterances:audio",), "video": ("utterances:vision",)},
    "facts": {
        "split": {"of": "utterances:part", "pattern": "(train|valid|test)"},
        "transcript": {"of": "utterances:raw_text"},
        "dialogue": {"of": "key", "pattern": r"(.+)\$_\$.+"},
        "turn": {"of": "key", "pattern": r".+\$_\$(\d+)"},
    },
    "targets": SENTIMENT,
    "task": "regression",
}
VARIANTS = {
    "unaligned": {
        "preset": "unaligned",
        "tables.files.utterances.path": "unaligned_50.pkl",
        "tables.files.utterances.lengths": (("audio", "audio_lengths"), ("vision", "vision_lengths")),
    },
    # The SDK's emotions are means of annotators, 0 to 3.
    "emotions": {
        "dataset": "mosei",
        "preset": "sdk",
        "tables.files.utterances.path": "CMU_MOSEI_Labels.csd",
        "tables.files.utterances.format": "mosei",
        "tables.targets": tuple((name, {"of": f"utterances:{name}", "at_least": 1e-6}) for name in EMOTIONS),
        "tables.task": "multilabel",
    },
    "audio": {"model.streams": ("audio",)},
    "video": {"model.streams": ("video",)},
    "text": {"model.streams": ("text",)},
    "av": {"model.streams": ("audio", "video")},
    "tav": {"model.streams": ("text", "audio", "video")},
    "all_clips": FUSION.MAFW.PROTOCOLS["all_clips"],
}


def base() -> ConfigDict:
    config = FUSION.base()
    config.name, config.dataset, config.preset = "mosei", "mosei:sentiment", "aligned"
    config.tables = ConfigDict(TABLES)
    config.model.update(streams=("text", "audio", "video"), text_source="given")
    config.train.update(seeds=(42, 43, 44), batch_size=64)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, VARIANTS | FUSION.FUSIONS)
