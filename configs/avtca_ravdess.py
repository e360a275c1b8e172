"""AVT-CA on RAVDESS, eight emotions, from raw face images and MFCC, five folds of disjoint actors.

Command:   python -m avjax.train --config configs/avtca_ravdess.py --config.data.root=RAVDESS
Data:      RAVDESS as it was downloaded (Actor_01/*.mp4; CC BY-NC-SA 4.0): the 1,440 clips of speech with video and
           audio. 15 images of 224 x 224 and 156 steps of 10 MFCC from 3.6 s in the middle. Not shipped.
Paper:     accuracy 96.11, F1 93.78: of a validation fifth, with no test set, all 7,360 files counted (Table I). An
           independent rerun of the released code on held-out actors got 66.7 to 71.25.
Measured:  no; the videos were not available. On 96 real clips: docs/results.md.
Variants:  Table V: it1, it4 (self-attention alone, 1 or 4 heads), ct1, ct4 (cross-attention alone), full; softhard (the
           modality dropout of MMER); repo: the released model with its optimizer; avtca_faulty: the released
           preprocessing with its faults (`avjax.features.presets.Window`), a word of the extraction too; avtca_112:
           smaller images, also there; protocols as in `configs/etg_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models import avt_ca
from avjax.models.fusions import registry as fusions
from avjax.settings import AugmentSettings

MAFW = module("configs/etg_mafw.py")
ENTRY = avt_ca.FUSIONS["avt_ca"]
RELEASED = fusions.FUSIONS["avtca_released"]
ROWS = module("configs/deiii_crema_d.py").rows(avt_ca.VARIANTS)
TABLE = (
    ROWS
    | {
        "repo": {
            "model.name": "avtca_released",
            "model.settings": fusions.settings("avtca_released") | {"frames": True},
            **{f"train.{key}": value for key, value in RELEASED.recipe.items()},
        },
        "avtca_faulty": {"preset": "avtca_faulty"},
        "avtca_112": {"preset": "avtca_112"},
    }
    | MAFW.PROTOCOLS
)


def base() -> ConfigDict:
    config = MAFW.base()
    config.name, config.dataset, config.preset = "avtca_ravdess", "ravdess", "avtca"
    config.model = fusions.model_config("avt_ca")
    config.model.update(streams=("audio", "video"), text_source="")
    config.model.settings.frames = True
    config.train.augment = ConfigDict(AugmentSettings().to_dict())
    config.train.update(**ENTRY.recipe, epochs_per_call=1, schedule="constant", warmup=0.0, patience=0)
    config.protocol.update(folds="speaker", validation=0.2)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
