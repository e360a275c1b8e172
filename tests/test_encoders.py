"""Encoders against independent implementations, and what padding, batching and bad checkpoints may do."""

import dataclasses
import json
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import encoders, layers
from avjax.encoders import bert, weights
from avjax.errors import AvjaxError

SEEDS = [int(s) for s in os.environ.get("AVJAX_ENCODER_SEEDS", "0,1,2").split(",")]
KINDS = ["bert", "distilbert"]
TINY = bert.BertConfig("bert", 50, 24, 1, 3, 40, 20, 2, "gelu", 1e-12)
# What the hub's config.json calls the fields of BertConfig; DistilBERT has neither token types nor a choice of eps.
KEYS = {
    "bert": {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
        "activation": "hidden_act",
        "eps": "layer_norm_eps",
    },
    "distilbert": {
        "vocab": "vocab_size",
        "width": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "inner": "hidden_dim",
        "positions": "max_position_embeddings",
        "activation": "activation",
    },
}


def hub_config(kind, fields):
    return {"model_type": kind} | {key: fields[field] for field, key in KEYS[kind].items()}


def draw(seed):
    """A small architecture: widths, heads, depth and activation vary with the seed."""
    rng = random.Random(seed)
    heads = rng.randint(1, 4)
    return {
        "vocab": rng.randint(30, 90),
        "width": heads * rng.choice([4, 7, 16]),
        "layers": rng.randint(1, 4),
        "heads": heads,
        "inner": rng.randint(9, 70),
        "positions": rng.randint(21, 40),
        "types": rng.randint(1, 3),
        "activation": rng.choice(["gelu", "gelu_new", "relu", "silu"]),
        "eps": rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-12
    }


def original(kind, drawn, head="Model"):
    """The PyTorch original, every parameter moved off its initial value so that none can be mistaken for another."""
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    prefix = {"bert": "Bert", "distilbert": "DistilBert"}[kind]
    config = getattr(transformers, f"{prefix}Config")(**hub_config(kind, drawn))
    torch.manual_seed(drawn["vocab"])
    model = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def reference(model, ids, mask):
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask))
    return output.last_hidden_state.numpy()


def batch(vocab, lengths, seed=0):
    """Random ids (b, l), under the padding too, and the mask of the lengths."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    return rng.integers(0, vocab, mask.shape).astype(np.int32), mask


def assert_close(got, want, mask):
    """The bound on float32 parity: 1e-4 of the standard deviation of the output, on real steps."""
    assert np.abs(got - want)[mask].max() <= 1e-4 * want[mask].std()


def random_params(config, seed=0):
    leaves, tree = jax.tree.flatten(bert.shapes(config))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.normal(0.3, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


def tiny_encoder(tmp_path, config=TINY, dtype=jnp.float32):
    return encoders.Encoder(bert.Bert(config, dtype), random_params(config), {}, tmp_path / "tokenizer.json", 0)


# Parity with the PyTorch originals


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_original(tmp_path, kind, seed):
    drawn = draw(seed)
    model = original(kind, drawn)
    model.save_pretrained(tmp_path)
    enc = encoders.load(tmp_path)
    ids, mask = batch(drawn["vocab"], [11, 3, 1, 21], seed)
    want = reference(model, ids, mask)
    got, got_mask = enc(ids, mask)
    assert_close(got, want, mask)
    np.testing.assert_array_equal(got_mask, mask)
    assert not got[~mask].any()
    assert (enc.width, enc.positions) == (drawn["width"], drawn["positions"])
    assert enc.provenance == {
        "source": tmp_path.name,
        "sha256": weights.sha256(tmp_path / "model.safetensors"),
        "model_type": kind,
        "dtype": "float32",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_parity_without_jit(tmp_path, kind):
    drawn = draw(SEEDS[0])
    model = original(kind, drawn)
    model.save_pretrained(tmp_path)
    config = bert.BertConfig.from_hub(json.loads((tmp_path / "config.json").read_text()))
    params = bert.convert(weights.read_tensors(tmp_path / "model.safetensors"), config)
    ids, mask = batch(drawn["vocab"], [5, 9])
    with jax.disable_jit():
        got = bert.Bert(config).apply({"params": params}, ids, mask)
    assert_close(np.asarray(got), reference(model, ids, mask), mask)


@pytest.mark.parametrize(
    ("kind", "head"),
    [("bert", "ForPreTraining"), ("bert", "ForTokenClassification"), ("distilbert", "ForSequenceClassification")],
)
def test_heads_and_prefix_of_a_checkpoint_are_put_aside(tmp_path, kind, head):
    drawn = draw(3)
    model = original(kind, drawn, head)
    model.save_pretrained(tmp_path)
    ids, mask = batch(drawn["vocab"], [5, 9])
    assert_close(encoders.load(tmp_path)(ids, mask)[0], reference(getattr(model, kind), ids, mask), mask)


def test_old_names_of_norms_are_understood():
    drawn = draw(4)
    model = original("bert", drawn)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    config = bert.BertConfig(model_type="bert", **drawn)
    assert old.keys() != tensors.keys()
    same = jax.tree.map(np.array_equal, bert.convert(old, config), bert.convert(tensors, config))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("kind", "total"),
    [("bert", 109_482_240), ("distilbert", 66_362_880), ("minilm", 22_713_216)],
)
def test_parameter_counts_of_the_originals(kind, total):
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    if kind == "distilbert":
        config, build = transformers.DistilBertConfig(), transformers.DistilBertModel
    else:
        small = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536} if kind == "minilm" else {}
        config, build = transformers.BertConfig(**small), transformers.BertModel
    with torch.device("meta"):
        named = {name: p.numel() for name, p in build(config).named_parameters()}
    pooler = sum(size for name, size in named.items() if name.startswith("pooler."))
    ours = bert.shapes(bert.BertConfig.from_hub(config.to_dict()))
    assert sum(named.values()) == total
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == total - pooler


# Padding, neighbours, precision, compilations


def test_padding_and_neighbours_do_not_change_an_answer(tmp_path):
    enc = tiny_encoder(tmp_path)
    ids, mask = batch(TINY.vocab, [7, 13, 1, 20, 4, 4, 9, 2, 16])
    together, _ = enc(ids, mask)
    for row, length in enumerate(mask.sum(1)):
        alone, _ = enc(jnp.asarray(ids[row : row + 1, :length]), jnp.ones((1, length), bool))
        np.testing.assert_allclose(together[row, :length], alone[0], atol=1e-5, rtol=0)
    for under_padding in (3, -100, 10**6):
        other, _ = enc(np.where(mask, ids, under_padding), mask)
        np.testing.assert_allclose(other, together, atol=1e-5, rtol=0)


def test_rows_without_a_real_step_and_empty_batches_give_zeros(tmp_path):
    enc = tiny_encoder(tmp_path)
    features, _ = enc(np.ones((2, 5), np.int32), np.zeros((2, 5), bool))
    np.testing.assert_array_equal(features, np.zeros((2, 5, TINY.width)))
    assert enc(np.ones((0, 0), np.int32), np.zeros((0, 0), bool))[0].shape == (0, 0, TINY.width)


def test_bfloat16_points_the_same_way(tmp_path):
    ids, mask = batch(TINY.vocab, [7, 13, 20])
    full, half = (tiny_encoder(tmp_path, dtype=d)(ids, mask)[0].sum(1) for d in (jnp.float32, jnp.bfloat16))
    assert half.dtype == np.float32
    assert np.abs(full - half).max() > 0, "bfloat16 was asked for, yet nothing was rounded"
    cosine = (full * half).sum(-1) / np.linalg.norm(full, axis=-1) / np.linalg.norm(half, axis=-1)
    assert cosine.min() >= 0.999


def test_compilations_are_one_for_each_bucket(tmp_path, monkeypatch):
    enc, traced, real = tiny_encoder(tmp_path), [], layers.attend
    monkeypatch.setattr(layers, "attend", lambda q, *rest: traced.append(q.shape[:2]) or real(q, *rest))
    for size in (1, 7, 8, 9, 16):
        for length in range(1, TINY.positions + 1):
            enc(np.ones((size, length), np.int64 if size % 2 else np.int32), np.ones((size, length), bool))
    assert sorted(set(traced)) == [(b, n) for b in (8, 16) for n in (8, 16, 20)]
    assert len(traced) == 6 * TINY.layers


# Mistakes


def test_input_beyond_the_positions_or_of_another_shape_is_refused(tmp_path):
    enc = tiny_encoder(tmp_path)
    with pytest.raises(AvjaxError, match=r"21 word pieces.* 20 positions"):
        enc(np.ones((1, 21), np.int32), np.ones((1, 21), bool))
    with pytest.raises(AvjaxError, match=r"inputs \(2, 5\) and mask \(2, 4\)"):
        enc(np.ones((2, 5), np.int32), np.ones((2, 4), bool))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_named(kind):
    drawn = draw(5) | {"layers": 2}
    tensors = {name: tensor.numpy() for name, tensor in original(kind, drawn).state_dict().items()}
    config = bert.BertConfig.from_hub(hub_config(kind, drawn))
    word = "embeddings.word_embeddings.weight"
    with pytest.raises(AvjaxError, match=rf"missing: {word}; left over: surprise$"):
        bert.convert({n: t for n, t in tensors.items() if n != word} | {"surprise": np.ones(3)}, config)
    last = [name for name in tensors if ".layer.1." in name]
    with pytest.raises(AvjaxError, match=f"left over: {', '.join(sorted(last))}$"):
        bert.convert(tensors, dataclasses.replace(config, layers=1))
    with pytest.raises(AvjaxError, match=r"shape .* does not fit"):
        bert.convert(tensors, dataclasses.replace(config, inner=config.inner + 1))


def test_kernel_the_wrong_way_round_is_refused():
    drawn = draw(6)
    tensors = {name: tensor.numpy() for name, tensor in original("bert", drawn).state_dict().items()}
    name = "encoder.layer.0.intermediate.dense.weight"
    assert tensors[name].shape[0] != tensors[name].shape[1]
    with pytest.raises(AvjaxError, match=name.replace(".", r"\.")):
        bert.convert(tensors | {name: tensors[name].T}, bert.BertConfig(model_type="bert", **drawn))


HUB = hub_config("bert", dataclasses.asdict(TINY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "activation 'mish'.*gelu"),
        ({"position_embedding_type": "relative_key"}, "absolute positions"),
        ({"is_decoder": True}, "only BERT encoders"),
        ({"model_type": "gpt2"}, "'gpt2', expected one of bert, distilbert"),
    ],
)
def test_configs_that_are_not_computed_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(HUB | change))
    with pytest.raises(AvjaxError, match=message):
        encoders.load(tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(AvjaxError, match=r"neither a registered name \(.*minilm\) nor a folder"):
        encoders.load(tmp_path / "nowhere")
    with pytest.raises(AvjaxError, match=r"no config\.json"):
        encoders.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in HUB.items() if k != "hidden_size"}))
    with pytest.raises(AvjaxError, match="lacks hidden_size"):
        encoders.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    with pytest.raises(AvjaxError, match=r"model\.safetensors: no such file"):
        encoders.load(tmp_path)
    with pytest.raises(AvjaxError, match=r"tokenizer\.json: no such file"):
        tiny_encoder(tmp_path).tokenize(["text"])


# The real sentence encoder

SENTENCES = [
    "A young woman smiles broadly and laughs with delight.",
    "Her brow is lowered, her lips are pressed together; the voice is loud, tense and fast.",
    "Inner brow raised, lip corners pulled down.",
    "No!",
    "",
    "Señor Müller’s naïve café – 日本 🙂 antidisestablishmentarianism, pitch 231.5 Hz",
]


@pytest.fixture(scope="module")
def minilm():
    try:
        folder = weights.fetch("minilm")
    except AvjaxError as error:
        pytest.skip(str(error))
    return folder, encoders.load("minilm")


@pytest.mark.weights
def test_minilm_equals_the_original_on_sentences(minilm):
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    folder, enc = minilm
    ids, mask = enc.tokenize(SENTENCES)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    full, _ = enc(ids, mask)
    assert_close(full, reference(model, ids, mask), mask)
    assert enc.width == 384
    assert enc.provenance["source"] == "minilm"
    half, _ = encoders.load("minilm", dtype="bfloat16")(ids, mask)
    pooled = [x.sum(1) / np.linalg.norm(x.sum(1), axis=-1, keepdims=True) for x in (full, half)]
    assert (pooled[0] * pooled[1]).sum(-1).min() >= 0.999


@pytest.mark.weights
@pytest.mark.parametrize("limit", [4, 16, None])
def test_ids_are_those_of_transformers(minilm, limit):
    import transformers

    folder, enc = minilm
    theirs = transformers.BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    long = [*SENTENCES, "very " * 600]
    want = theirs(long, padding=True, truncation=True, max_length=limit or 512, return_tensors="np")
    ids, mask = enc.tokenize(long, limit)
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"].astype(bool))
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


@pytest.mark.weights
def test_tokenize_refuses_lengths_without_room_and_takes_no_texts(minilm):
    _, enc = minilm
    for limit in (0, 2, 513):
        with pytest.raises(AvjaxError, match=f"max_length is {limit}, expected 3 to 512"):
            enc.tokenize(["text"], limit)
    assert enc.tokenize([])[0].shape == (0, 0)
