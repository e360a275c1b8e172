"""Perceiver IO for optical flow in PyTorch."""

import math

import numpy as np

from tests.originals import Original


def draw(rng):
    import transformers

    heads, cross = rng.randint(1, 4), rng.choice([1, 2, 7])  # the latter divides the pixels' 322 = 2 · 7 · 23
    unit = math.lcm(heads, cross)
    return transformers.PerceiverConfig(
        train_size=[rng.randint(2, 13), rng.randint(2, 13)],
        num_latents=rng.randint(1, 20),
        # Wider ones would be scored so sharply, stirred as they are, that PyTorch itself loses the fourth digit.
        d_latents=unit * rng.randint(-(-12 // unit), 60 // unit),
        num_blocks=rng.choice([1, 1, 2]),
        num_self_attends_per_block=rng.randint(0, 3),
        num_self_attention_heads=heads,
        num_cross_attention_heads=cross,
        cross_attention_shape_for_attention=rng.choice(["kv", "q"]),
        self_attention_widening_factor=rng.randint(1, 3),
        cross_attention_widening_factor=rng.randint(1, 3),
        hidden_act=rng.choice(["gelu", "relu", "gelu_new"]),
        use_query_residual=rng.choice([True, False]),
        d_model=322,
    )


def build(config):
    import torch
    import transformers

    model = transformers.PerceiverForOpticalFlow(config).eval()
    if _is_small(config):
        return model
    # At its own start no pixel of the true size prefers any latent, and the flow is the same everywhere.
    for kernel in (p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2):
        torch.nn.init.normal_(kernel, std=1.5 * kernel.shape[1] ** -0.5)
    return model


def _is_small(config):
    return max(config.train_size) < 100


def inputs(rng, config):
    mask = np.array([True, False, True] if _is_small(config) else [True])
    pairs = rng.uniform(-1, 1, (len(mask), 2, *config.train_size, 3)).astype(np.float32)
    pairs[~mask] = np.nan
    return pairs, mask


def patches(pairs):
    """(b, 2, h, w, 3) → (b, 2, 27, h, w) as the original takes them: extract_image_patches of DeepMind's notebook."""
    import torch

    padded = torch.nn.functional.pad(torch.tensor(pairs), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # b 2 h w 3 y x
    return windows.permute(0, 1, 5, 6, 4, 2, 3).reshape(*pairs.shape[:2], 27, *pairs.shape[2:4])


def reference(model, pairs, mask, layer=None):
    import torch

    with torch.no_grad():
        flow = model(inputs=patches(pairs)).logits.numpy()
    flow = flow.reshape(len(pairs), -1, 2)
    return flow, np.repeat(mask[:, None], flow.shape[1], 1)


def true_size():
    import transformers

    return transformers.PerceiverConfig(
        num_latents=2048,
        d_latents=512,
        d_model=322,
        num_self_attends_per_block=24,
        num_self_attention_heads=16,
        num_cross_attention_heads=1,
    )


KINDS = {
    "perceiver": Original(
        draw=draw,
        build=build,
        inputs=inputs,
        reference=reference,
        full={"optical flow": (true_size, 41_057_134)},
    )
}
