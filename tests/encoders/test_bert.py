"""BERT and DistilBERT: checkpoints as published, mistakes, the tokenizer, and the real sentence encoder."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import bert, weights
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.bert import KINDS, reference


def drawn(kind, seed, head="Model"):
    """A small PyTorch model with a head, and its configuration."""
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    config = KINDS[kind].draw(random.Random(seed))
    prefix = {"bert": "Bert", "distilbert": "DistilBert"}[kind]
    return stirred(getattr(transformers, f"{prefix}{head}")(config), seed), config


def tensors_of(kind, seed):
    model, config = drawn(kind, seed)
    return {n: t.numpy() for n, t in model.state_dict().items()}, bert.BertConfig.from_hub(config.to_dict())


def assert_close(got, want, mask):
    assert np.abs(got - want)[mask].max() <= 1e-4 * want[mask].std()


# Checkpoints as they are found


@pytest.mark.parametrize(
    ("kind", "head"),
    [("bert", "ForPreTraining"), ("bert", "ForTokenClassification"), ("distilbert", "ForSequenceClassification")],
)
def test_heads_and_prefix_of_a_checkpoint_are_put_aside(tmp_path, kind, head):
    model, config = drawn(kind, 3, head)
    model.save_pretrained(tmp_path)
    ids, mask = KINDS[kind].inputs(np.random.default_rng(0), config)
    want, _ = reference(getattr(model, kind), ids, mask)
    assert_close(encoders.load(tmp_path, dtype="float32")(ids, mask)[0], want, mask)


def test_old_names_of_norms_are_understood():
    tensors, config = tensors_of("bert", 4)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    same = jax.tree.map(np.array_equal, bert.convert(old, config), bert.convert(tensors, config))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_named(kind):
    tensors, config = tensors_of(kind, 6)
    assert config.layers > 1
    word = next(name for name in tensors if name.endswith("embeddings.word_embeddings.weight"))
    plain = word.removeprefix(f"{kind}.")
    with pytest.raises(AvjaxError, match=rf"missing: {plain}; left over: surprise$"):
        bert.convert({n: t for n, t in tensors.items() if n != word} | {"surprise": np.ones(3)}, config)
    last = [name for name in tensors if f".layer.{config.layers - 1}." in name]
    with pytest.raises(AvjaxError, match=f"left over: {', '.join(sorted(last))}$"):
        bert.convert(tensors, dataclasses.replace(config, layers=config.layers - 1))
    with pytest.raises(AvjaxError, match=r"shape .* does not fit"):
        bert.convert(tensors, dataclasses.replace(config, inner=config.inner + 1))


def test_kernel_the_wrong_way_round_is_refused():
    tensors, config = tensors_of("bert", 6)
    name = "encoder.layer.0.intermediate.dense.weight"
    assert tensors[name].shape[0] != tensors[name].shape[1]
    with pytest.raises(AvjaxError, match=name.replace(".", r"\.")):
        bert.convert(tensors | {name: tensors[name].T}, config)


# Mistakes

HUB = KINDS["bert"].draw(random.Random(0)).to_dict()


def test_input_beyond_the_positions_is_refused():
    config = bert.BertConfig.from_hub(HUB)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), bert.shapes(config))
    enc = encoders.Encoder(bert, bert.Bert(config), params, {})
    long = np.ones((1, config.positions + 1), np.int32)
    with pytest.raises(AvjaxError, match=rf"{config.positions + 1} word pieces.* {config.positions} positions"):
        enc(long)
    with pytest.raises(AvjaxError, match=r"tokenizer\.json: no such file"):
        enc.tokenize(["text"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "activation 'mish'.*gelu"),
        ({"position_embedding_type": "relative_key"}, "absolute positions"),
        ({"is_decoder": True}, "only BERT encoders"),
    ],
)
def test_configs_that_are_not_computed_are_refused(change, message):
    with pytest.raises(AvjaxError, match=message):
        bert.BertConfig.from_hub(HUB | change)


def test_configs_that_lack_something_are_refused():
    with pytest.raises(AvjaxError, match=r"config\.json of a bert lacks hidden_size"):
        bert.BertConfig.from_hub({k: v for k, v in HUB.items() if k != "hidden_size"})


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
    return folder, encoders.load("minilm", dtype="float32")


@pytest.mark.weights
def test_minilm_equals_the_original_on_sentences(minilm):
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    folder, enc = minilm
    ids, mask = enc.tokenize(SENTENCES)
    config = transformers.BertConfig(**weights.REGISTRY["minilm"].written["config.json"])
    model = transformers.BertModel.from_pretrained(folder, config=config, add_pooling_layer=False).eval()
    full, _ = enc(ids, mask)
    assert_close(full, reference(model, ids, mask)[0], mask)
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
