"""EmoAsst on MELD, seven emotions of utterances from a television series, the official division.

Command:   python -m avjax.train --config configs/emoasst_meld.py --config.data.root=MELD
Data:      MELD (Poria et al. 2019; GPL-3.0, clips of the series): 9,989 / 1,109 / 2,610 utterances. Not shipped.
Paper:     accuracy / weighted F1. Linear probe on video (Table 2) 49.36 / 36.31, + prompt 50.37 / 37.13; few-shot
           classifier on video (Table 3) 50.83 / 38.28, + prompt 52.04 / 41.18; on audio (Table 4) 51.72 / 39.08,
           + prompt 52.66 / 41.50; on both (Table 5) 49.57 / 41.88, + prompt 51.86 / 42.34.
Measured:  no; the data set was not available. A run's table of heads has all rows of the tables: `video_probe`,
           `video_cache` or `video_tuned`, `audio_…`, `both_…`; `:utterance` trains the rows without "+ prompt".
Variants:  utterance: text of the clip instead of prompts; label_free_query: prompts in the contrast alone and not in
           the query, which has no label to copy then (label_in_query: in both, the paper's way); visual_supcon: SupCon
           for the video too; video, audio: one modality; tuned, zero: which classifier predicts (default cache);
           best_epoch: the epoch by validation; protocols and presets as in `configs/etg_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models import emoasst
from avjax.settings import FusionSettings, PromptSettings

ETG = module("configs/etg_mafw.py")
TABLE = (
    ETG.PROTOCOLS
    | {
        "best_epoch": {"protocol.select": "val"},
        "emoasst": {"preset": "emoasst"},
        "lite": {"preset": "lite"},
        "open": {"preset": "open"},
        # For a few hundred clips.
        "small": {"model.settings.width": 128, "model.settings.heads": 4, "model.settings.inner": 256},
        # The rows without "+ prompt" of Tables 2 to 5.
        "utterance": {"model.settings.prompt": False},
        # Whether the query of the video is the prompt, too, which names the label, in training: the paper's way.
        "label_in_query": {"model.settings.label_in_query": True},
        "label_free_query": {"model.settings.label_in_query": False},
        "visual_supcon": {"model.settings.visual_loss": "supcon"},
        "video": {"model.streams": ("text", "video"), "train.rates": ()},
        "audio": {"model.streams": ("text", "audio")},
    }
    | {reader: {"model.settings.reader": reader} for reader in emoasst.PREDICTING if reader != "cache"}
)


def base() -> ConfigDict:
    config = ETG.base()
    config.name, config.dataset, config.preset = "emoasst_meld", "meld", "emoasst"
    own = FusionSettings(name="emoasst", text_source="utterance", settings=emoasst.settings())
    config.model = ConfigDict(own.to_dict())
    config.prompts = ConfigDict(PromptSettings().to_dict())
    # The paper selects no epoch that it tells of; validation clips are for the classifiers' alpha, beta and strength.
    config.protocol.select = "last"
    config.train.update(
        epochs=200,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup=0.0,
        schedule="constant",
        clip_norm=0.0,
        patience=0,
        # The auditory adapter learns at 1e-4.
        rates=(("^(aa|project_audio|express_audio)/", 0.1),),
    )
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
