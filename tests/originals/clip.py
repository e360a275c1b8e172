"""CLIP's towers in PyTorch."""

import functools

import numpy as np

from tests.originals import Original


def draw(kind, rng):
    import transformers

    heads = rng.randint(1, 4)
    common = {
        "hidden_size": heads * rng.choice([4, 7, 16]),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(9, 70),
        "hidden_act": rng.choice(["quick_gelu", "gelu", "relu"]),
        "layer_norm_eps": rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-5
        "projection_dim": rng.randint(3, 30),
    }
    if kind == "clip_vision_model":
        patch = rng.choice([2, 3, 5])
        return transformers.CLIPVisionConfig(image_size=patch * rng.randint(1, 6), patch_size=patch, **common)
    vocab, positions = rng.randint(30, 90), rng.randint(21, 40)
    end = rng.choice([2, rng.randint(3, vocab - 1)])  # 2 stands for the largest id of a text
    return transformers.CLIPTextConfig(
        vocab_size=vocab, max_position_embeddings=positions, bos_token_id=0, eos_token_id=end, **common
    )


def build(config):
    import transformers

    if config.model_type == "clip_vision_model":
        return transformers.CLIPVisionModel(config).eval()
    return transformers.CLIPTextModel(config).eval()


def pictures(rng, config):
    mask = np.array([True, False, True])
    batch = rng.normal(size=(len(mask), config.image_size, config.image_size, 3)).astype(np.float32)
    batch[~mask] = np.nan
    return batch, mask


def texts(rng, config):
    lengths = np.array([11, 3, 1, 21])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    return rng.integers(0, config.vocab_size, mask.shape).astype(np.int32), mask


def of_pictures(model, batch, mask, layer=None):
    import torch

    with torch.no_grad():
        output = model(torch.tensor(batch).permute(0, 3, 1, 2), output_hidden_states=layer is not None)
    hidden = (output.last_hidden_state if layer is None else output.hidden_states[layer]).numpy()
    return hidden, np.repeat(mask[:, None], hidden.shape[1], 1)


def of_texts(model, ids, mask, layer=None):
    import torch

    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            output_hidden_states=layer is not None,
        )
    hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
    return hidden.numpy(), mask


def _full(kind, **sizes):
    import transformers

    return (transformers.CLIPVisionConfig if kind == "clip_vision_model" else transformers.CLIPTextConfig)(**sizes)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LARGE_TEXT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
KINDS = {
    "clip_vision_model": Original(
        draw=functools.partial(draw, "clip_vision_model"),
        build=build,
        inputs=pictures,
        reference=of_pictures,
        full={
            "CLIP ViT-B/32": (functools.partial(_full, "clip_vision_model"), 87_454_464),
            "CLIP ViT-L/14": (functools.partial(_full, "clip_vision_model", patch_size=14, **LARGE), 303_177_728),
        },
    ),
    "clip_text_model": Original(
        draw=functools.partial(draw, "clip_text_model"),
        build=build,
        inputs=texts,
        reference=of_texts,
        full={
            "CLIP ViT-B/32": (functools.partial(_full, "clip_text_model"), 63_165_952),
            "CLIP ViT-L/14": (functools.partial(_full, "clip_text_model", **LARGE_TEXT), 123_060_480),
        },
    ),
}
