"""Emotion prompts: the texts of the figure, the limit of an encoder, and the features made from them."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from avjax import config as configs
from avjax.datasets import folder
from avjax.datasets.base import Clip
from avjax.encoders import weights
from avjax.errors import AvjaxError
from avjax.features import encode as encoding
from avjax.features import presets, prompts
from avjax.text import prompt_templates
from tests import synthetic

TRANSCRIPT = "Oh, me too."


# ---- Words ---------------------------------------------------------------------------------------------------------


def test_the_six_formats_of_the_figure():
    assert prompt_templates.prompts("joy", TRANSCRIPT, "Rachel", "female") == (
        "A joy video.",
        "A joy woman is speaking.",
        "The speaker has a joy face.",
        "She is saying “Oh, me too.” with a joy emotion.",
        "Rachel is joy in this video.",
        "The utterance “Oh, me too.” shows the speaker's joy.",
    )


def test_a_man():
    texts = prompt_templates.prompts("anger", TRANSCRIPT, "Ross", "male")
    assert texts[1] == "A anger man is speaking."
    assert texts[3] == "He is saying “Oh, me too.” with a anger emotion."


def test_what_is_unknown_leaves_no_gap():
    assert (
        prompt_templates.prompts("joy")
        == prompt_templates.prompts("joy", "", "", None)
        == (
            "A joy video.",
            "A joy person is speaking.",
            "The speaker has a joy face.",
            "They are saying something with a joy emotion.",
            "The speaker is joy in this video.",
            "The utterance shows the speaker's joy.",
        )
    )


def test_words_that_look_like_placeholders_are_words():
    assert prompt_templates.prompts("joy", "{label} {0}", "{they}", "male")[3:5] == (
        "He is saying “{label} {0}” with a joy emotion.",
        "{they} is joy in this video.",
    )


def test_a_class_is_named_by_formats_one_and_three():
    assert prompt_templates.of_class("fear") == ("A fear video.", "The speaker has a fear face.")
    assert prompt_templates.of_class("fear") == tuple(
        prompt_templates.prompts("fear", TRANSCRIPT, "Joey", "male")[i] for i in (0, 2)
    )


def test_another_gender_is_an_error():
    with pytest.raises(AvjaxError, match=r"gender is 'f'; choose one of female, male, None"):
        prompt_templates.prompts("joy", gender="f")


def test_genders_come_from_the_table(tmp_path):
    rows = ["a.wav,joy,Female", "b.wav,joy,male", "c.wav,joy,", "d.wav,joy,f"]
    for row in rows:
        (tmp_path / row.split(",")[0]).write_bytes(b"audio")
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,gender", *rows]))
    corpus = folder.index(tmp_path)
    assert [(clip.id, clip.gender) for clip in corpus.clips] == [("a", "female"), ("b", "male"), ("c", None)]
    assert corpus.rejected == (("d", "gender is 'f'; expected female or male, or nothing"),)


# ---- What fits -----------------------------------------------------------------------------------------------------


def clip_saying(words: str | None, label: str = "joy") -> Clip:
    return Clip("c", None, label, transcript=words, speaker="Phoebe")


def words_of(text: str) -> int:
    return len(text.split())


def test_words_are_left_out_at_the_end_until_all_prompts_fit():
    long = " ".join(f"w{i}" for i in range(50))
    # "They are saying “…” with a joy emotion." has eight words beside those said: more than any other.
    texts = prompts.fitted(clip_saying(long), words_of, 20)
    kept = " ".join(f"w{i}" for i in range(13))
    assert texts == prompt_templates.prompts("joy", kept, "Phoebe")
    assert max(map(words_of, texts)) == 20
    assert prompts.fitted(clip_saying(kept), words_of, 20) == texts
    assert prompts.fitted(clip_saying(None), words_of, 20) == prompt_templates.prompts("joy", None, "Phoebe")
    assert prompts.fitted(clip_saying(long), words_of, 3) == prompt_templates.prompts("joy", None, "Phoebe")


@pytest.mark.parametrize(
    ("preset", "random"), [("emoasst", True), pytest.param("lite", False, marks=pytest.mark.weights)]
)
def test_labels_and_the_end_token_stay_within_the_limit_of_encoders(preset, random):
    settings = presets.preset(preset)
    encoder = encoding.Loader(random)(settings.text)
    long, limit = "supercalifragilistic " * 90, settings.max_tokens
    _, *joy, end = encoder.tokenize(["joy"])[0][0].tolist()
    texts = prompts.fitted(clip_saying(long), prompts._counter(encoder), limit)
    assert "supercalifragilistic" in texts[3]
    rows = [row[real].tolist() for row, real in zip(*encoder.tokenize(texts, limit), strict=True)]
    assert max(map(len, rows)) <= limit
    for row in rows:
        assert row[-1] == end
        assert holds(row, joy)
    cut = encoder.tokenize(prompt_templates.prompts("joy", long), limit)[0]
    assert cut.shape[1] == limit
    assert not holds(cut[3].tolist(), joy), "it would have been cut off"


def holds(row: list[int], some: list[int]) -> bool:
    return any(row[i : i + len(some)] == some for i in range(len(row)))


# ---- Features ------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Counts words."""

    def no_truncation(self) -> None:
        pass

    def encode(self, text: str) -> "Tokenizer":
        self.ids = text.split()
        return self


class Encoder:
    """A vector for each word, made from its letters; records the texts that it is given."""

    width, tokenizer = 3, Tokenizer()

    def __init__(self):
        self.provenance, self.asked = {"source": "fake"}, []

    def tokenize(self, texts, limit):
        self.asked += texts
        rows = [text.split()[:limit] for text in texts]
        mask = np.arange(max(map(len, rows)))[None] < np.array([len(row) for row in rows])[:, None]
        ids = np.zeros((*mask.shape, 3), np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = [vector(word) for word in row]
        return ids, mask

    def __call__(self, ids, mask):
        return ids, mask


def vector(word: str) -> np.ndarray:
    return np.array([len(word), ord(word[0]) / 64, ord(word[-1]) / 64], np.float32)


def mean(text: str) -> np.ndarray:
    # Kept in half precision, as all features are.
    return np.mean([vector(word) for word in text.split()], 0).astype(np.float16).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@pytest.fixture
def encoder(monkeypatch, tmp_path) -> Encoder:
    """The encoder of any preset, and an empty cache."""
    fake = Encoder()
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(encoding, "Loader", lambda random: lambda wanted: fake)
    return fake


def talking(**more):
    """Six clips, of which the first and the third have a transcript."""
    made = synthetic.make(6)
    words, people = ("Oh, me too.", None, "No!", None, None, None), ("female", None, "male", None, "male", "female")
    changes = zip(made.clips, words, people, strict=True)
    return dataclasses.replace(
        made, clips=[dataclasses.replace(c, transcript=t, gender=g) for c, t, g in changes], **more
    )


def attached(features, **more):
    return prompts.attach(features, configs.settings("configs/emoasst_folder.py", **more), Console(quiet=True))


def test_features_get_prompts_utterances_and_classes(encoder):
    features = talking()
    result = attached(features)
    assert result.arrays["prompts"].shape == (6, 6, 3)
    assert result.masks["prompts"].all()
    for i, clip in enumerate(features.clips):
        texts = prompt_templates.prompts(clip.label, clip.transcript, clip.speaker, clip.gender)
        np.testing.assert_array_equal(result.arrays["prompts"][i], np.stack([mean(t) for t in texts]))
    assert result.sentences["utterance"] == ["Oh, me too.", "", "No!", "", "", ""]
    assert result.masks["text_utterance"].tolist() == [[True], [False], [True], [False], [False], [False]]
    nothing = np.zeros(3)
    spoken = [mean("Oh, me too."), nothing, mean("No!"), nothing, nothing, nothing]
    np.testing.assert_array_equal(result.arrays["text_utterance"][:, 0], spoken)
    for name, row in zip(features.classes, result.constants["classes"], strict=True):
        both = np.mean([unit(mean(t)) for t in prompt_templates.of_class(name)], 0)
        np.testing.assert_allclose(row, unit(both), atol=1e-6)
    assert all(v.dtype == np.float32 for v in (result.arrays["prompts"], result.constants["classes"]))
    assert features.arrays.keys() < result.arrays.keys()
    assert "prompts" not in features.arrays, "what is given stays as it is"


def test_each_text_is_encoded_once_and_kept(encoder, tmp_path):
    first = attached(talking())
    asked = list(encoder.asked)
    assert len(asked) == len(set(asked)) > 10
    (kept,) = (tmp_path / "prompts").iterdir()
    again = attached(talking())
    assert encoder.asked == asked
    np.testing.assert_array_equal(again.arrays["prompts"], first.arrays["prompts"])
    encoder.provenance = {"source": "another"}
    attached(talking())
    assert len(encoder.asked) == 2 * len(asked)
    assert len(list((tmp_path / "prompts").iterdir())) == 2
    assert kept.is_file()


def test_utterances_of_new_clips_are_those_of_the_data(encoder):
    features = talking()
    full, alone = attached(features), prompts.attach_utterances(features, "lite", False, Console(quiet=True))
    name = f"text_{prompts.UTTERANCE}"
    assert alone.arrays.keys() == features.arrays.keys() | {name}
    np.testing.assert_array_equal(alone.arrays[name], full.arrays[name])
    np.testing.assert_array_equal(alone.masks[name], full.masks[name])
    assert alone.sentences[prompts.UTTERANCE] == [clip.transcript or "" for clip in features.clips]
    silent = dataclasses.replace(features, clips=[dataclasses.replace(c, transcript=None) for c in features.clips])
    assert not prompts.attach_utterances(silent, "lite", False, Console(quiet=True)).masks[name].any()


def test_a_damaged_cache_file_is_an_error(encoder, tmp_path):
    attached(talking())
    (kept,) = (tmp_path / "prompts").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(AvjaxError, match=r"prompts/\w+\.npz: .*delete it"):
        attached(talking())


def test_the_encoder_is_that_of_the_preset(encoder, monkeypatch):
    asked = []
    monkeypatch.setattr(encoding, "Loader", lambda random: lambda wanted: asked.append((wanted, random)) or encoder)
    attached(talking())
    attached(talking(), prompts__preset="emoasst", weights__random=True)
    assert asked == [(presets.preset("lite").text, False), (presets.preset("emoasst").text, True)]
    with pytest.raises(AvjaxError, match="preset is 'none'"):
        attached(talking(), prompts__preset="none")


def test_other_tasks_have_no_prompts(encoder):
    with pytest.raises(AvjaxError, match="one class per clip; the labels of these data are of the task 'regression'"):
        attached(synthetic.values(40))


@pytest.mark.weights
def test_real_prompts_tell_the_classes_apart(monkeypatch, tmp_path):
    """Without cached files, prompts of one label are nearer to it than to others."""
    fetched = weights.fetch("minilm")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "minilm").symlink_to(fetched if fetched.is_dir() else fetched.parent)
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    names = ("anger", "joy", "sadness")
    made = talking()
    clips = [dataclasses.replace(c, label=names[y]) for c, y in zip(made.clips, made.label, strict=True)]
    result = attached(dataclasses.replace(made, classes=names, clips=clips))
    vectors = result.arrays["prompts"] / np.linalg.norm(result.arrays["prompts"], axis=-1, keepdims=True)
    nearest = (vectors @ result.constants["classes"].T).argmax(-1)
    assert np.mean(nearest == made.label[:, None]) > 0.9
    assert result.arrays["text_utterance"].shape == (6, 1, 384)
