"""RAVDESS, eight emotions, from action units and acoustics that others have measured; five folds of disjoint actors.

Command:   python -m avjax.train --config configs/ravdess_features.py:av,speaker_norm --config.data.root=R
Data:      R/ravdess_luna5cv (Luna-Jiménez et al. 2022: mean OpenFace action units of each clip, their folds) and
           R/ravdess_au_mfcc (112 acoustic statistics; action units of a second OpenFace run). 1,440 clips, 24 actors.
           RAVDESS is CC BY-NC-SA 4.0 (Livingstone & Russo 2018). Not shipped.
Published: the folds' authors: action units 62.13, both 86.70 (wav2vec 2.0 fine-tuned), mean fold accuracy.
Measured:  yardsticks, the best of conventional models on both streams: .714, with speaker_norm .850; both_aus .759,
           .887. The logistic regression that each run prints, nothing searched: .679, .822; .732, .865. Three seeds
           together, concat: .728, .847; .760, .887, give or take .03 (docs/comparison.md has every fusion).
Variants:  audio, video, av: which streams enter; both_aus: the second run's action units stand beside the first's;
           fusions by name and speaker_norm, enrol, all_clips: as in `configs/fusion_mafw.py`. Each clip is one step,
           so that there is nothing to attend to in time.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.fusions import registry as fusions

FUSION = module("configs/fusion_mafw.py")

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
# The actors who are tested in each fold.
FOLDS = ((2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22))
# Modality, then what names the clip: vocal channel, emotion, intensity, statement, repetition, actor.
NAME = r"\d\d-(\d\d-\d\d-\d\d-\d\d-\d\d-\d\d)"
TABLES = {
    "files": {
        "units": {
            "path": "ravdess_luna5cv/trainingData/avg_MLP80_AUs/data_AUs_avg/df_average_AUs_total.csv",
            "key": "name",
            "pattern": NAME,
        },
        "units2": {"path": "ravdess_au_mfcc/au_mfcc.npz", "key": "name", "pattern": NAME},
        "acoustic": {"path": "ravdess_au_mfcc/acoustic112.csv", "key": "names:0"},
        "names": {"path": "ravdess_au_mfcc/acoustic112_row_names.txt", "header": False},
    },
    "streams": {
        "video": ("units:AU01_r..AU45_c",),
        "audio": ("acoustic:pitch_mean..delta2_mfcc_13_std",),
    },
    "facts": {
        "label": {
            "of": "key",
            "pattern": r"\d\d-(\d\d)-.*",
            "names": tuple((f"{i:02d}", name) for i, name in enumerate(EMOTIONS, 1)),
        },
        "speaker": {"of": "key", "pattern": r".*-(\d\d)"},
        "fold": {
            "of": "key",
            "pattern": r".*-(\d\d)",
            "names": tuple((f"{actor:02d}", str(f)) for f, actors in enumerate(FOLDS) for actor in actors),
        },
    },
}
VARIANTS = {
    "audio": {"model.streams": ("audio",)},
    "video": {"model.streams": ("video",)},
    "av": {"model.streams": ("audio", "video")},
    "both_aus": {"preset": "both_aus", "tables.streams.video": ("units:AU01_r..AU45_c", "units2:au")},
}


def base() -> ConfigDict:
    config = FUSION.base()
    config.name, config.dataset, config.preset = "ravdess_features", "ravdess_features", "tables"
    config.tables = ConfigDict(TABLES)
    # The sentence of these clips carries no label: the same two are spoken with every emotion.
    config.model.update(streams=("audio", "video"), text_source="")
    config.train.update(epochs=30, batch_size=32)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, VARIANTS | fusions.variants(("audio", "video")) | FUSION.MAFW.PROTOCOLS)
