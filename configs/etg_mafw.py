"""ETG-AVER on MAFW, eleven single emotions or 43 compound ones, the five official folds, on precomputed features.

Command:   python -m avjax.train --config configs/etg_mafw.py [--config.data.root=MAFW]
           What is not extracted yet is extracted first. Without MAFW (no root, nothing at `$AVJAX_DATA/mafw`) the demo
           corpus stands in, synthetic and of the same layout, and every figure says so.
Data:      MAFW (signed agreement); 9,172 single-label clips, 8,996 of compound emotions. Not shipped.
Paper:     WAR 60.78, UAR 44.27 (mean of five folds; end-to-end fine-tuned encoders, 1e-5, batch 4, seed 42).
Here:      frozen encoders; not measured: the data set was not at hand. Demo corpus: docs/quickstart.md.
           Learning rate 1e-3 and batch 8: frozen encoders leave little to train, and so the demo corpus is learned in
           25 epochs (1e-4 or batch 32 leaves it half learned). Nothing was chosen on MAFW.
Variants:  the rows of Tables III–VI and Figure 3 (`avjax.models.etg_aver.VARIANTS`), the protocols and the presets
           below (the words of the extraction: `configs/extract_mafw.py`);
           several are joined by commas: `configs/etg_mafw.py:no_hlo,speaker_norm`.
           finetune: the paper's training, encoders and all, from pictures, waveforms and tokens; wants an accelerator.
           lora: the same with low-rank changes of the encoders' attention, which the run writes out merged.
           With the encoders that can be had without the hub: `finetune,open_raw`, `lora,open_raw`.
           compound: the 43 compound emotions.
"""

from ml_collections import ConfigDict

from avjax.config import module, with_variants
from avjax.models.etg_aver import VARIANTS
from avjax.models.lora import Lora

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
    config = ConfigDict(
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
                # Of `etg_aver_raw`: those of the preset, trained along.
                "encoders": {
                    "tune": "full",  # full: all weights but the frozen | lora: low-rank changes of the targets
                    "frozen": (),  # patterns of paths such as video/block_0/attention/query/kernel, ^text/, /words/
                    "lora": {"rank": Lora.rank, "alpha": Lora.alpha, "targets": Lora.targets},
                    "remat": True,  # on accelerators, blocks are computed once more for gradients: less memory
                },
            },
            "protocol": {
                "folds": "auto",  # auto | given | speaker | stratified
                "fold_count": 5,  # of `stratified`, and of `speaker` when there are more speakers than that
                "only": "",  # one fold by its name, such as one of folds that overlap; "" = all
                # A division that is not the data set's own may put speakers on both sides; every result then says so.
                "allow_speaker_overlap": False,
                "standardise": "train",  # train | speaker | enrol | none
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
                "rates": (),  # (pattern of paths, factor of the learning rate), the first that is found counts
                "layer_decay": 1.0,  # factor from each block of an encoder to the one below it; 1.0 = none
                "accumulate": 1,  # pieces that a batch is cut into: less memory, and the update of the whole
                "weight_decay": 1e-2,
                "warmup": 0.05,  # share of all steps
                "schedule": "cosine",  # cosine | constant
                "clip_norm": 1.0,  # 0 = gradients are not clipped
                "patience": 10,  # epochs without a better validation score; 0 = never stop early
                "save_steps": 200,  # of streamed data: steps between checkpoints within an epoch; 0 = none
                "epochs_per_call": 5,  # epochs in one compiled call; checkpoints are written between calls
                "remat": False,  # compute a batch once more for its gradients, rather than keep it: less memory
            },
            # How devices share the work; a run may go on with another mesh.
            "mesh": {
                "preset": "auto",  # auto: lanes, or dp of one lane | single | dp | fsdp | tp | lanes
                # Or by axes, 0 = not given: lanes | clips | clips, and parameters between steps | heads, hidden units.
                "lane": 0,
                "data": 0,
                "fsdp": 0,
                "tensor": 0,
            },
            # Of a run of several processes (`launch/`): seconds for all to join, and until a silent one is given up.
            "processes": {"wait": 300, "patience": 300},
        }
    )
    config.model.encoders.preset = config.get_ref("preset")
    config.model.encoders.random = config.weights.get_ref("random")
    return config


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, TABLE | {"compound": {"dataset": "mafw:compound"}})
