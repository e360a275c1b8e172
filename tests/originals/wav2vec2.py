"""wav2vec 2.0 and data2vec for speech in PyTorch."""

import functools
import math

import numpy as np

from tests.originals import Original


def _common(rng):
    groups, heads = rng.randint(1, 3), rng.randint(1, 3)
    convs = rng.randint(2, 4)
    return {
        "hidden_size": 2 * groups * heads * rng.choice([1, 3, 4]),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": rng.randint(9, 50),
        "conv_dim": [rng.randint(5, 20) for _ in range(convs)],
        "conv_kernel": [rng.randint(2, 11) for _ in range(convs)],
        "conv_stride": [rng.randint(1, 6) for _ in range(convs)],
        "conv_bias": rng.random() < 0.5,
        "num_conv_pos_embedding_groups": groups,
        "feat_extract_activation": rng.choice(["gelu", "gelu_new"]),
        "hidden_act": rng.choice(["gelu", "relu", "gelu_new"]),
        "layer_norm_eps": rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-5
        "mask_time_prob": rng.choice([0.0, 0.05]),  # whether there is a vector for masked steps, to be put aside
    }


def draw(kind, rng):
    import transformers

    common = _common(rng)
    if kind == "data2vec-audio":
        return transformers.Data2VecAudioConfig(
            **common, num_conv_pos_embeddings=rng.randint(1, 4), conv_pos_kernel_size=rng.randint(2, 9)
        )
    return transformers.Wav2Vec2Config(
        **common,
        num_conv_pos_embeddings=rng.randint(2, 40),
        feat_extract_norm=rng.choice(["group", "layer"]),
        do_stable_layer_norm=rng.random() < 0.5,
    )


def build(config):
    import transformers

    kinds = {"wav2vec2": transformers.Wav2Vec2Model, "data2vec-audio": transformers.Data2VecAudioModel}
    return kinds[config.model_type](config).eval()


def least(config):
    """The shortest input that the convolutions make a step of."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def inputs(rng, config):
    """Rows of many steps, of one, and one too short for any; lengths that leave samples over."""
    hop = math.prod(config.conv_stride)
    lengths = np.array([least(config) + hop * steps + left for steps, left in [(9, hop - 1), (0, 0), (0, -1), (23, 1)]])
    mask = np.arange(lengths.max() + hop)[None] < lengths[:, None]
    return rng.normal(0.1, 1, mask.shape).astype(np.float32), mask


def reference(model, waves, mask, layer=None):
    """Each row alone: the original's group norm runs over padding too, and rows without a step confuse it."""
    steps = int(model._get_feat_extract_output_lengths(waves.shape[1]))
    features = np.zeros((len(waves), steps, model.config.hidden_size), np.float32)
    real = np.zeros(features.shape[:2], bool)
    for row, wave in enumerate(waves):
        if mask[row].sum() >= least(model.config):
            alone = _alone(model, wave[mask[row]], layer)
            features[row, : len(alone)], real[row, : len(alone)] = alone, True
    return features, real


def _alone(model, wave, layer):
    import torch

    with torch.no_grad():
        output = model(torch.tensor(wave)[None], output_hidden_states=layer is not None)
    return (output.last_hidden_state if layer is None else output.hidden_states[layer])[0].numpy()


def _full(kind, **settings):
    import transformers

    return (transformers.Data2VecAudioConfig if kind == "data2vec-audio" else transformers.Wav2Vec2Config)(**settings)


LARGE_ROBUST = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
}
# The counts leave out the vector for masked steps and, of wav2vec 2.0, the 128 gains of weight normalisation, which
# are multiplied into the kernel.
KINDS = {
    "wav2vec2": Original(
        draw=functools.partial(draw, "wav2vec2"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "wav2vec2-base": (functools.partial(_full, "wav2vec2"), 94_370_816),
            "wav2vec2-large-robust": (functools.partial(_full, "wav2vec2", **LARGE_ROBUST), 315_437_568),
        },
    ),
    "data2vec-audio": Original(
        draw=functools.partial(draw, "data2vec-audio"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={"data2vec-audio-base": (functools.partial(_full, "data2vec-audio"), 93_163_520)},
    ),
}
