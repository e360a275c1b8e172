"""BERT and DistilBERT in PyTorch."""

import functools

import numpy as np

from tests.originals import Original


def draw(kind, rng):
    import transformers

    heads = rng.randint(1, 4)
    width, inner, depth = heads * rng.choice([4, 7, 16]), rng.randint(9, 70), rng.randint(1, 4)
    vocab, positions, activation = rng.randint(30, 90), rng.randint(21, 40), rng.choice(["gelu", "relu", "gelu_new"])
    if kind == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=vocab,
            dim=width,
            n_layers=depth,
            n_heads=heads,
            hidden_dim=inner,
            max_position_embeddings=positions,
            activation=activation,
        )
    return transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=rng.randint(1, 3),
        hidden_act=activation,
        layer_norm_eps=rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-12
    )


def build(config):
    import transformers

    if config.model_type == "distilbert":
        return transformers.DistilBertModel(config).eval()
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def inputs(rng, config):
    lengths = np.array([11, 3, 1, 21])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    return rng.integers(0, config.vocab_size, mask.shape).astype(np.int32), mask


def reference(model, ids, mask, layer=None):
    import torch

    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask),
            output_hidden_states=layer is not None,
        )
    hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
    return hidden.numpy(), mask


def _full(kind, **small):
    import transformers

    return (transformers.DistilBertConfig if kind == "distilbert" else transformers.BertConfig)(**small)


MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12}
KINDS = {
    "bert": Original(
        draw=functools.partial(draw, "bert"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "BERT base": (functools.partial(_full, "bert"), 108_891_648),
            "MiniLM-L6": (functools.partial(_full, "bert", **MINILM), 22_565_376),
        },
    ),
    "distilbert": Original(
        draw=functools.partial(draw, "distilbert"),
        build=build,
        inputs=inputs,
        reference=reference,
        full={"DistilBERT base": (functools.partial(_full, "distilbert"), 66_362_880)},
    ),
}
