"""Tokenizers in folders: tokenizer.json, or the vocabulary files of older checkpoints."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from avjax import encoders
from avjax.encoders import base, bert, clip
from avjax.errors import AvjaxError

TEXTS = ["Her voice is high.", "no", "", "Señor Müller’s naïve café – 日本 🙂 " * 5]
SIZES = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "her", "voice", "is", "high", ".", "##s", "senor", "no"]
BERT = SIZES | {"model_type": "bert", "vocab_size": len(PIECES), "max_position_embeddings": 16}
BERT |= {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "no</w>", "<|startoftext|>", "<|endoftext|>"]
CLIP = SIZES | {"model_type": "clip_text_model", "vocab_size": len(PAIRS), "max_position_embeddings": 16}
CLIP |= {"bos_token_id": len(PAIRS) - 2, "eos_token_id": len(PAIRS) - 1}


def word_pieces(folder):
    """A BERT's folder with vocab.txt alone."""
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return bert, BERT


def byte_pairs(folder):
    """A CLIP's folder with vocab.json and merges.txt."""
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PAIRS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nn o</w>\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return clip.TEXT, CLIP


def encoder(folder, family, config):
    """A small encoder in `folder` with meaningless weights."""
    (folder / "config.json").write_text(json.dumps(config))
    module = family.build(config, np.dtype("float32"), None)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), family.shapes(module.config))
    return encoders.Encoder(family, module, params, {}, files=base.Files(config, folder / "model.safetensors"))


@pytest.mark.parametrize("write", [word_pieces, byte_pairs])
def test_vocabularies_give_the_ids_of_transformers(tmp_path, write):
    import transformers

    enc = encoder(tmp_path, *write(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    want = theirs(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="np")
    ids, mask = enc.tokenize(TEXTS)
    np.testing.assert_array_equal(mask, want["attention_mask"].astype(bool))
    np.testing.assert_array_equal(ids[mask], want["input_ids"][mask])
    assert len({*ids[mask]}) > 8


def test_a_cased_vocabulary_stays_cased(tmp_path):
    family, config = word_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    ids, _ = encoder(tmp_path, family, config).tokenize(["Her", "her"])
    assert ids[:, 1].tolist() == [PIECES.index("[UNK]"), PIECES.index("her")]


def test_a_tokenizer_file_comes_first(tmp_path):
    enc = encoder(tmp_path, *word_pieces(tmp_path))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"her": 3, "?": 0}, unk_token="?"))
    made.save(str(tmp_path / "tokenizer.json"))
    assert enc.tokenize(["her"])[0].tolist() == [[3]]


@pytest.mark.parametrize("left", [[], ["vocab.json"], ["merges.txt"]])
def test_folders_without_a_whole_tokenizer_are_refused(tmp_path, left):
    family, config = byte_pairs(tmp_path)
    for name in {"vocab.json", "merges.txt"} - {*left}:
        (tmp_path / name).unlink()
    with pytest.raises(AvjaxError, match=r"tokenizer\.json: no such file; put .* there, or vocab\.txt, or vocab\.json"):
        encoder(tmp_path, family, config).tokenize(["text"])


def test_a_vocabulary_of_unknown_kind_is_refused(tmp_path):
    family, config = byte_pairs(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(
        AvjaxError, match=r"transformers makes no tokenizer of its files .*; put a tokenizer\.json there"
    ):
        encoder(tmp_path, family, config).tokenize(["text"])


def test_encoders_are_imported_without_transformers():
    code = (
        "import sys, avjax.encoders; print(sorted({'clu', 'librosa', 'tokenizers', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
