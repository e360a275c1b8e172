"""The encoder of Whisper in PyTorch."""

import copy
import functools
from unittest import mock

import numpy as np

from tests.originals import Original

# Of the decoder, which checkpoints carry and the encoder has no use for.
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8, "max_target_positions": 4}
TOKENS = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}


def draw(rng):
    import transformers

    heads = rng.randint(1, 4)
    return transformers.WhisperConfig(
        num_mel_bins=rng.randint(3, 20),
        d_model=heads * rng.choice([4, 6, 16]),  # even, for sines and cosines
        encoder_layers=rng.randint(1, 4),
        encoder_attention_heads=heads,
        encoder_ffn_dim=rng.randint(9, 70),
        max_source_positions=rng.randint(12, 24),
        activation_function=rng.choice(["gelu", "relu", "gelu_new"]),
        **DECODER,
        **TOKENS,
    )


def build(config):
    import transformers

    return transformers.WhisperModel(config).eval()


def inputs(rng, config):
    lengths = np.array([11, 3, 1, 2 * config.max_source_positions, 16])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    spectra = rng.normal(0, 1, (len(lengths), config.num_mel_bins, lengths.max()))
    return np.where(mask[:, None], spectra, 1e3).astype(np.float32), mask


def reference(model, spectra, mask, layer=None):
    lengths, steps = mask.sum(1), (mask.shape[1] + 1) // 2
    rows = [alone(model.encoder, row[:, :n], layer) for row, n in zip(spectra, lengths, strict=True)]
    features = np.stack([np.pad(row, ((0, steps - len(row)), (0, 0))) for row in rows])
    return features, np.arange(steps)[None] < (lengths[:, None] + 1) // 2


def alone(encoder, spectrum, layer=None):
    """What the encoder says to one spectrum (bins, n), when it is built for that length: (steps, d)."""
    import torch

    length = spectrum.shape[1]
    positions = encoder.embed_positions.weight[: (length + 1) // 2]
    config = copy.copy(encoder.config)
    vars(config)["max_source_positions"] = length / 2  # past its validation: the forward pass wants twice this length
    with (
        torch.no_grad(),
        mock.patch.object(encoder, "config", config),
        mock.patch.object(encoder, "embed_positions", torch.nn.Embedding.from_pretrained(positions)),
    ):
        output = encoder(torch.tensor(spectrum)[None], output_hidden_states=layer is not None)
    hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
    return hidden[0].numpy()


def _full(width, layers, heads, **rest):
    import transformers

    return transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        **DECODER,
        **rest,
    )


KINDS = {
    "whisper": Original(
        draw=draw,
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "Whisper tiny.en": (functools.partial(_full, 384, 4, 6, vocab_size=51864), 8_208_384),
            "Whisper base": (functools.partial(_full, 512, 6, 8), 20_590_592),
        },
    ),
}
