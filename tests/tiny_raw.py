"""Three small encoders with random weights, a preset of their inputs, and made-up clips."""

import dataclasses

import numpy as np

from avjax import config
from avjax.encoders import weights
from avjax.encoders.sources import Entry
from avjax.features import presets
from avjax.features.store import Features
from tests import synthetic

_BERT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
_CONVS = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 4]}
SHAPES = {
    "tiny_image": _BERT | {"num_hidden_layers": 2, "model_type": "vit", "image_size": 16, "patch_size": 8},
    "tiny_text": _BERT
    | {
        "model_type": "bert",
        "vocab_size": 1300,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
    "tiny_waves": _BERT
    | _CONVS
    | {"model_type": "wav2vec2", "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    "tiny_spectra": {
        "model_type": "whisper",
        "d_model": 12,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 20,
        "num_mel_bins": 6,
        "max_source_positions": 50,
    },
}
SETTINGS = {"tiny_image": {"size": {"height": 16, "width": 16}}, "tiny_spectra": {"feature_size": 6}}
PRESET = presets.Preset(
    frames=3,
    max_seconds=0.5,
    image=presets.Encoding("tiny_image", pool="first"),
    face=False,
    speech=presets.Encoding("tiny_spectra", layer=1),
    text=presets.Encoding("tiny_text"),
    max_tokens=40,
    raw=True,
)
PRESETS = {"tiny_raw": PRESET, "tiny_waves": dataclasses.replace(PRESET, speech=presets.Encoding("tiny_waves"))}


def register(patch) -> None:
    """Registers encoders and presets as long as `patch` (of pytest) lasts."""
    for name, shape in SHAPES.items():
        written = {"config.json": shape, "preprocessor_config.json": SETTINGS.get(name, {})}
        patch.setitem(weights.REGISTRY, name, Entry(what="tiny", licence="none", files={}, sources=(), written=written))
    for name, preset in PRESETS.items():
        patch.setitem(presets.PRESETS, name, preset)


def settings(variants: str = "finetune", preset: str = "tiny_raw", **more):
    """Returns the configuration of a fast run on `features`."""
    chosen = {"preset": preset, "weights__random": True, "model__width": 16, "model__dropout": 0.0}
    chosen |= {"train__seeds": (1,), "train__epochs": 4, "train__epochs_per_call": 4, "train__patience": 0}
    return config.settings(f"configs/etg_folder.py:{variants}", **(chosen | more))


def features(clips: int = 12, preset: str = "tiny_raw", seed: int = 0, noise: float = 0.1) -> Features:
    """Makes clips whose class shows in brightness, audio and words; clip 3 lacks audio, 5 a face, 7 its sentence."""
    rng = np.random.default_rng(seed)
    made = synthetic.make(clips, seed=seed)
    label = made.label
    masks = {s: np.arange(n)[None] < rng.integers(n // 2, n + 1, clips)[:, None] for s, n in _LENGTHS[preset].items()}
    masks["audio"][3], masks["video"][5], masks["text"][7] = False, False, False
    bright = 60 + 60 * label[:, None, None, None, None] + 100 * noise * rng.normal(size=(clips, 3, 16, 16, 3))
    width = 1 if preset == "tiny_waves" else 6
    tone = np.sin(np.arange(masks["audio"].shape[1])[None] * (0.2 + 0.3 * label[:, None]))[..., None]
    audio = tone + noise * rng.normal(size=(*masks["audio"].shape, width))
    words = np.where(rng.random((*masks["text"].shape, 1)) < noise, 9, 10 + label[:, None, None])
    arrays = {
        "video": np.where(masks["video"][..., None, None, None], bright.clip(0, 255), 0).astype(np.uint8),
        "audio": np.where(masks["audio"][..., None], audio, 0).astype(np.float32),
    }
    text = np.where(masks["text"][..., None], words, 0).astype(np.int32)
    names = [name for name in made.arrays if name.startswith("text_")]
    return dataclasses.replace(
        made,
        arrays=arrays | dict.fromkeys(names, text),
        masks={s: masks[s] for s in arrays} | dict.fromkeys(names, masks["text"]),
    )


_LENGTHS = {
    "tiny_raw": {"video": 3, "audio": 20, "text": 7},
    "tiny_waves": {"video": 3, "audio": 300, "text": 7},
}


def batch(made: Features, constants, rows: slice = slice(None)) -> dict[str, object]:
    """Returns the clips `rows` as the model reads them."""
    out = {"label": made.label[rows], "weight": np.ones(len(made.label[rows]), np.float32)}
    for stream in ("video", "audio", "text"):
        name = "text_both" if stream == "text" else stream
        out[stream], out[f"{stream}_mask"] = made.arrays[name][rows], made.masks[name][rows]
    return out | dict(constants)
