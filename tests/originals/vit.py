"""ViT and DINOv2 in PyTorch."""

import functools

import numpy as np

from tests.originals import Original


def draw(kind, rng):
    import transformers

    heads = rng.randint(1, 4)
    patch = rng.choice([2, 3, 5])
    common = {
        "hidden_size": heads * rng.choice([4, 7, 16]),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "hidden_act": rng.choice(["gelu", "relu", "gelu_new"]),
        "layer_norm_eps": rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-6 and 1e-12
        "qkv_bias": rng.choice([True, False]),
    }
    if kind == "dinov2":
        side = patch * rng.randint(2, 6)
        return transformers.Dinov2Config(image_size=side, patch_size=patch, mlp_ratio=rng.randint(1, 4), **common)
    wide = rng.choice([patch, 4])
    image = rng.choice([[patch * rng.randint(1, 4), wide * rng.randint(1, 4)], 2 * patch * wide])
    return transformers.ViTConfig(
        image_size=image, patch_size=[patch, wide], intermediate_size=rng.randint(9, 70), **common
    )


def build(config):
    import transformers

    if config.model_type == "dinov2":
        return transformers.Dinov2Model(config).eval()
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def inputs(rng, config):
    mask = np.array([True, False, True])
    pictures = rng.normal(size=(len(mask), *_size(rng, config), 3)).astype(np.float32)
    pictures[~mask] = np.nan
    return pictures, mask


def _size(rng, config):
    if config.model_type == "vit":
        return np.broadcast_to(config.image_size, 2)
    # A small DINOv2 gets pictures of any size; those of the true size are used at 224, whatever they were trained at.
    return config.patch_size * rng.integers(1, 8, 2) if config.image_size < 224 else (224, 224)


def reference(model, pictures, mask, layer=None):
    import torch

    with torch.no_grad():
        output = model(torch.tensor(pictures).permute(0, 3, 1, 2), output_hidden_states=layer is not None)
    hidden = (output.last_hidden_state if layer is None else output.hidden_states[layer]).numpy()
    return hidden, np.repeat(mask[:, None], hidden.shape[1], 1)


def _full(kind, **sizes):
    import transformers

    return (transformers.Dinov2Config if kind == "dinov2" else transformers.ViTConfig)(**sizes)


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_attention_heads": 6}
KINDS = {
    "vit": Original(
        draw=functools.partial(draw, "vit"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "ViT-B/16": (functools.partial(_full, "vit"), 85_798_656),
            "ViT-B/32": (functools.partial(_full, "vit", patch_size=32), 87_455_232),
            "ViT-L/16": (functools.partial(_full, "vit", **LARGE), 303_301_632),
        },
    ),
    "dinov2": Original(
        draw=functools.partial(draw, "dinov2"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "DINOv2 S/14": (functools.partial(_full, "dinov2", image_size=518, **SMALL), 22_056_192),
            "DINOv2 B/14": (functools.partial(_full, "dinov2", image_size=518), 86_579_712),
        },
    ),
}
