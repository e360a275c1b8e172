"""DE-III on CREMA-D, six intended emotions, five folds of disjoint actors; or the emotions that a crowd saw.

Command:   python -m avjax.train --config configs/deiii_crema_d.py --config.data.root=CREMA-D
Data:      CREMA-D as it was downloaded (VideoFlash/*.flv, AudioWAV/*.wav; ODbL): 7,442 clips of 91 actors, of which
           five are left out. The folds are blocks of actors, 1001 to 1018 and so on, as in HiCMAE's lists. Not shipped.
Paper:     F1 macro 79.5, micro 83.7 (Table 1; five folds, training, validation and test with disjoint actors).
Measured:  no; the videos were not available. On 96 real clips: docs/results.md.
           Batch 32 and the convolution's kernel are not stated in the paper. A validation fifth of the training actors
           picks epoch and head.
Variants:  crowd: what most of the crowd saw, 5,820 clips in the five partitions of VAVL, whose lists are to be beside
           the films (`avjax.datasets.crema_d.crowd`); they overlap, so each is reported by itself. soft: the same with
           soft labels from the votes.
           The rows of Tables 2 and 3 (`avjax.models.de_iii.VARIANTS`; `ife_video` is the row called full there, with
           that head by name); of Table 4, as words of the extraction too: w3s1, w5s1, w7s1, w3s3, w5s5, w7s7 (window
           and stride of the flow), flow_dinov2; `small` sizes for a few hundred clips; protocols as in
           `configs/etg_mafw.py`; features as in `configs/extract_mafw.py`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models import de_iii
from avjax.models.fusions import registry as fusions

MAFW = module("configs/etg_mafw.py")
EXTRACT = module("configs/extract_mafw.py")


def rows(table: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Rows of a paper, name → {setting: value}, as variants of a configuration."""
    top = ("streams", "name")
    return {
        name: {f"model.{key}" if key in top else f"model.settings.{key}": value for key, value in row.items()}
        for name, row in table.items()
    }


ENTRY = de_iii.FUSIONS["de_iii"]
TABLE = rows(de_iii.VARIANTS | {"small": dict(ENTRY.small)}) | MAFW.PROTOCOLS | EXTRACT.PRESETS | EXTRACT.TABLE_4

TARGETS = {name: {"dataset": f"crema_d:{name}", "protocol.folds": "given"} for name in ("crowd", "soft")}


def base() -> ConfigDict:
    config = MAFW.base()
    config.name, config.dataset, config.preset = "deiii_crema_d", "crema_d", "deiii"
    config.model = fusions.model_config("de_iii")
    config.model.update(streams=de_iii.DeIII.streams, text_source="")
    config.train.update(**ENTRY.recipe, patience=5, epochs_per_call=1, schedule="constant", warmup=0.0)
    config.protocol.update(folds="given", validation=0.2)
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE | TARGETS)
