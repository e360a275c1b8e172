"""ETG-AVER on MAFW, eleven single emotions, the five official folds, on precomputed features.

Command:   python -m avjax.train --config configs/etg_mafw.py [--config.data.root=MAFW]
           What is not extracted yet is extracted first. Without MAFW (no root, nothing at `$AVJAX_DATA/mafw`) the demo
           corpus stands in, synthetic and of the same layout, and every figure says so.
Data:      MAFW (signed agreement); 9,172 single-label clips. Not shipped.
Paper:     WAR 60.78, UAR 44.27 (mean of five folds; end-to-end fine-tuned encoders, 1e-5, batch 4, seed 42).
Here:      frozen encoders; not measured: the data set was not at hand. Demo corpus: README, "Two commands".
           Learning rate 1e-3 and batch 8: frozen encoders leave little to train, and so the demo corpus is learned in
           25 epochs (1e-4 or batch 32 leaves it half learned). Nothing was chosen on MAFW.
Variants:  the rows of Tables III–VI and Figure 3 (`avjax.models.etg_aver.VARIANTS`), the protocols and the presets
           below (the words of the extraction: `configs/extract_mafw.py`);
           several are joined by commas: `configs/etg_mafw.py:no_hlo,speaker_norm`.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.etg_aver import VARIANTS

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
}
TABLE = {name: {f"model.{k}": v for k, v in row.items()} for name, row in VARIANTS.items()} | PROTOCOLS | PRESETS


def base() -> ConfigDict:
    return ConfigDict(
        {
            "name": "etg_mafw",
            "variants": "",
            "dataset": "mafw",
            "preset": "lite",
            # True: encoders get weights drawn at random, for trying what cannot be had; every figure says so.
            "weights": {"random": False},
            "data": {
                "root": "",  # the data set as it was downloaded; "" = $AVJAX_DATA/<dataset>
                "features": "",  # the feature store; "" = $AVJAX_CACHE/features/<dataset>
                "mode": "auto",  # resident: on the device | streamed: from disk, batch by batch | auto: by size
            },
            "model": {
                "name": "etg_aver",
                "width": 128,  # of the `lite` preset; the paper's encoders give 768
                "streams": ("text", "audio", "video"),
                "text_source": "both",  # both | audio | video | constant
                "guide": True,
                "fusion": "attention",
                "hlo": True,
                "loss_weights": (2.0, 2.0, 1.0, 1.0),  # fusion, text, audio, video
                "weighting": "softmax",
                "temperature": 0.1,
                "query": "tokens",
                "summary": "mean",  # MiniLM is trained on the mean of its tokens; the paper's DistilBERT: "first"
                "segment_count": 8,
                "dropout": 0.0,
                "imbalance": "none",  # none | class_weights | logit_adjustment
                "smoothing": 0.0,
                "dtype": "float32",
            },
            "protocol": {
                "folds": "auto",  # auto | given | speaker | stratified
                "fold_count": 5,  # of `stratified`, and of `speaker` when there are more speakers than that
                "standardise": "train",  # train | speaker | enrol
                "enrol_clips": 16,
                "validation": 0.1,  # share of the training clips (of the training speakers where known); 0 = none
                "select": "val",  # val: best epoch on validation | last
            },
            "train": {
                "seeds": (42,),
                "epochs": 25,
                "optimizer": "adamw",  # adamw | adam | sgd
                "batch_size": 8,
                "learning_rate": 1e-3,
                "weight_decay": 1e-2,
                "warmup": 0.05,  # share of all steps
                "schedule": "cosine",  # cosine | constant
                "clip_norm": 1.0,
                "patience": 10,  # epochs without a better validation score; 0 = never stop early
                "save_steps": 200,  # of streamed data: steps between checkpoints within an epoch; 0 = none
                "epochs_per_call": 5,  # epochs in one compiled call; checkpoints are written between calls
            },
        }
    )


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE)
