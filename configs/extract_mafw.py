"""Features and sentences of MAFW's single-label clips.

Command:   python -m avjax.extract --config configs/extract_mafw.py --config.data.root=MAFW --out F
Data:      MAFW as it was downloaded: data/clips/*.mp4 and Train & Test Set/single/no_caption/set_{1..5}/.
Variants:  lite (default): blendshapes, action units and head pose; log-mel, MFCC, pitch, energy; MiniLM tokens.
           open: Whisper-base, ViT-S/14 beside the face measurements, MiniLM: encoders that can be had without the hub.
           open_raw: what those encoders read, for training that moves them, too: 8 face images, log-mel spectra of
           the first 10 s, token ids. etg_raw: the same for those of etg, with waveforms.
           From the hub or `$AVJAX_WEIGHTS`, what the papers used:
           etg: data2vec-audio, ViT-B/16, DistilBERT (ETG-AVER).
           deiii: wav2vec 2.0 large, robust; EfficientNet-B2 of HSEmotion on the face in every frame and on its optical
           flow (DE-III): Perceiver IO's (`flow_perceiver`), which wants an accelerator; `flow_dis`: OpenCV's DIS.
           deiii_lite, deiii_open: DE-III's streams without the hub: the measurements of `lite` in every frame, or the
           encoders of `open` ten times a second, with DIS flow.
           avtca: 15 face images of 224 x 224 and 10 MFCC from 3.6 s in the middle (AVT-CA); avtca_112: of 112 x 112;
           avtca_faulty: with the faults of the released preprocessing (`avjax.features.presets.Window`).
           emoasst: CLIP ViT-B/32 on 24 whole frames and on texts, wav2vec 2.0 base of SEGUE up to layer 9 (EmoAsst).
"""

from ml_collections import ConfigDict

from avjax.config import with_variants
from avjax.features.presets import DEIII_WINDOWS
from avjax.settings import ExtractSettings

_PRESETS = (
    "lite",
    "open",
    "open_raw",
    "etg",
    "etg_raw",
    "deiii",
    "deiii_lite",
    "deiii_open",
    "avtca",
    "avtca_112",
    "avtca_faulty",
    "emoasst",
)
# DE-III's Table 4: window and stride of the flow, and what sees it.
TABLE_4 = {f"w{w}s{s}": {"preset": f"deiii_w{w}s{s}"} for w, s in DEIII_WINDOWS} | {
    "flow_dinov2": {"preset": "deiii_flow_dinov2"}
}
PRESETS = {name: {"preset": name} for name in _PRESETS} | {
    "flow_perceiver": {"preset": "deiii"},
    "flow_dis": {"preset": "deiii_dis"},
}


def base() -> ConfigDict:
    # Every key has its default and its meaning in `avjax.settings`; `--keys` prints them.
    return ConfigDict(ExtractSettings(name="extract_mafw", dataset="mafw").to_dict())


def get_config(variants: str = "") -> ConfigDict:
    return with_variants(base(), variants, PRESETS | TABLE_4)
