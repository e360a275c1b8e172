"""Random weights: of the true shape, reproducible, and marked as random."""

import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import loading, random_weights, registry, weights
from avjax.errors import AvjaxError


def test_they_are_the_same_every_time_and_say_what_they_are(monkeypatch):
    monkeypatch.setattr(weights, "fetch", lambda *_: pytest.fail("nothing is to be fetched"))
    texts = ["Their voice is high.", "no", ""]
    first, second = (encoders.load("minilm", random=True, dtype="float32") for _ in range(2))
    ids, mask = first.tokenize(texts)
    features, _ = first(ids, mask)
    np.testing.assert_array_equal(features, second(*second.tokenize(texts))[0])
    assert np.abs(features[0, :4] - features[1, :4]).max() > 0.1
    assert first.random
    assert first.provenance["source"] == "minilm"
    assert first.provenance["sha256"] == "random, seed 0"


def test_every_byte_of_a_text_is_a_token_between_the_first_and_the_last():
    clip = encoders.load("clip_vit_b32", tower="text", random=True)
    ids, mask = clip.tokenize(["ab é", "a" * 200])
    assert mask.sum(1).tolist() == [2 + 5, 77]
    assert ids[:, 0].tolist() == [49406, 49406]
    assert ids[0, 6] == ids[1, 76] == 49407, "the end is kept where a text is cut"
    assert ids[0, 1] == ids[1, 1] != ids[0, 2]
    with pytest.raises(AvjaxError, match="a vit takes no text"):
        random_weights.tokenizer("vit")


@pytest.mark.parametrize("name", [n for n, entry in registry.REGISTRY.items() if "config.json" in entry.written])
def test_every_registered_architecture_is_known(name):
    contents = registry.REGISTRY[name].written["config.json"]
    for tower in ("vision", "text") if contents["model_type"] == "clip" else (None,):
        contents = loading.select_tower(registry.REGISTRY[name].written["config.json"], tower)
        family = encoders.FAMILIES[contents["model_type"]]
        assert family.shapes(family.build(contents, np.dtype("float32"), None).config)


def test_features_of_pictures_neither_vanish_nor_explode():
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    enc = encoders.load("hsemotion_b2", random=True, pool="mean", dtype="float32")
    features, _ = enc(*enc.prepare(frames))
    assert features.shape == (2, 1408)
    assert 1e-4 < features.std() < 1e3, "they are stored in half precision"


def test_what_has_no_registered_shape_is_refused(tmp_path):
    for source in ("face_landmarker", str(tmp_path)):
        with pytest.raises(AvjaxError, match=r"random weights take an encoder whose shape is registered, one of clip"):
            encoders.load(source, random=True)
