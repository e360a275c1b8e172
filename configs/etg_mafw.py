"""ETG-AVER on MAFW, eleven single emotions or 43 compound ones, the five official folds, on precomputed features.

Command:   python -m avjax.train --config configs/etg_mafw.py [--config.data.root=MAFW]
           What is not extracted yet is extracted first. Without MAFW (no root, nothing at `$AVJAX_DATA/mafw`) the demo
           corpus stands in, synthetic and of the same layout, and every figure is marked with it.
Data:      MAFW (signed agreement); 9,172 single-label clips, 8,996 of compound emotions. Not shipped.
Paper:     WAR 60.78, UAR 44.27 (mean of five folds; end-to-end fine-tuned encoders, 1e-5, batch 4, seed 42).
Measured:  frozen encoders; not measured, as the data set was not available. Demo corpus: docs/quickstart.md.
           Learning rate 1e-3 and batch 8: frozen encoders leave little to train, and so the demo corpus is learned in
           25 epochs (1e-4 or batch 32 leaves it half learned). Nothing was chosen on MAFW.
Variants:  the rows of Tables III–VI and Figure 3 (`avjax.models.etg_aver.VARIANTS`), the protocols and the presets
           below (the words of the extraction: `configs/extract_mafw.py`);
           several are joined by commas: `configs/etg_mafw.py:no_hlo,speaker_norm`.
           finetune: the paper's training, encoders and all, from images, waveforms and tokens; wants an accelerator.
           lora: the same with low-rank changes of the encoders' attention, which the run writes out merged.
           With the encoders that can be had without the hub: `finetune,open_raw`, `lora,open_raw`.
           compound: the 43 compound emotions.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.etg_aver import VARIANTS
from avjax.settings import Settings

PROTOCOLS = {
    # Feature statistics of each speaker's own clips, without labels. Transductive: always named beside the scores.
    "speaker_norm": {"protocol.standardise": "speaker"},
    # The same from a few enrolment clips per speaker, which are then not scored.
    "enrol": {"protocol.standardise": "enrol"},
    # Nothing held out and nothing selected: all training clips, last epoch. For sets too small to give clips away.
    "all_clips": {"protocol.validation": 0.0, "protocol.select": "last"},
}
# The features, by the words under which they were extracted.
PRESETS = module("configs/extract_mafw.py").PRESETS | {
    "etg": {"preset": "etg", "model.width": 768, "model.summary": "first"},
    "etg_raw": {"preset": "etg_raw", "model.width": 768, "model.summary": "first"},
    "open_raw": {"preset": "open_raw", "model.width": 384, "model.summary": "mean"},
}
_RAW = PRESETS["etg_raw"] | {
    "model.name": "etg_aver_raw",
    "protocol.standardise": "none",  # the encoders' inputs are prepared as they were in pretraining
    "train.seeds": (42,),
    "train.batch_size": 4,
    "train.epochs": 25,
    "train.epochs_per_call": 1,
    "train.weight_decay": 1e-2,
}
TUNED = {
    # The layers near the input are to keep what they know (Bao et al. 2022); not stated in the paper.
    "finetune": _RAW | {"train.learning_rate": 1e-5, "train.layer_decay": 0.75},
    "lora": _RAW | {"model.encoders.tune": "lora", "train.learning_rate": 1e-4},
}
ROWS = {name: {f"model.{k}": v for k, v in row.items()} for name, row in VARIANTS.items()}
TABLE = ROWS | PROTOCOLS | PRESETS | TUNED


def base() -> ConfigDict:
    # Every key has its default and its meaning in `avjax.settings`; `--keys` prints them.
    config = ConfigDict(Settings(name="etg_mafw", dataset="mafw").to_dict())
    config.model.encoders.preset = config.get_ref("preset")
    config.model.encoders.random = config.weights.get_ref("random")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE | {"compound": {"dataset": "mafw:compound"}})
