"""MELD, on a miniature of its download."""

import csv

import pytest

from avjax import datasets
from avjax.datasets.base import Clip, natural_folds
from avjax.errors import AvjaxError

FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
HEADER = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "Season"]
COUNTS = {"train": 9, "dev": 3, "test": 5}
EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")


def rows(part):
    return [
        [i, f"I\x92m {part} {i}", ("Rachel", "Joey", "Waiter")[i % 3], EMOTIONS[i % 7], "x", i // 2, i % 2, 1]
        for i in range(COUNTS[part])
    ]


def write(root, part, table):
    with (root / f"{part}_sent_emo.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *table])


@pytest.fixture
def meld(tmp_path):
    """Three parts whose numbers of dialogues begin anew, and a stray film of the download."""
    for part, folder in FOLDERS.items():
        (tmp_path / folder).mkdir()
        write(tmp_path, part, rows(part))
        for row in rows(part):
            (tmp_path / folder / f"dia{row[5]}_utt{row[6]}.mp4").write_bytes(b"x")
    (tmp_path / FOLDERS["test"] / "final_videos_testdia0_utt0.mp4").write_bytes(b"x")
    return tmp_path


def test_the_official_division(meld):
    corpus = datasets.index("meld", str(meld))
    assert (corpus.name, corpus.task.kind, corpus.task.classes, corpus.rejected) == ("meld", "single", EMOTIONS, ())
    (fold,) = corpus.folds
    assert {"train": len(fold.train), "dev": len(fold.val), "test": len(fold.test)} == COUNTS
    assert len({c.id for c in corpus.clips}) == sum(COUNTS.values())
    assert natural_folds(corpus.clips, corpus.folds)[0] == [fold]
    assert corpus.clips[3] == Clip(
        id="train/dia1_utt1",
        path=meld / "train_splits/dia1_utt1.mp4",
        label="joy",
        speaker="Rachel",
        gender="female",
        transcript="I’m train 3",
        dialogue="train/1",
        turn=1,
    )
    assert [c.gender for c in corpus.clips[:3]] == ["female", "male", None]


def test_films_that_are_missing_are_named_and_the_rest_goes_on(meld):
    (meld / "train_splits/dia1_utt1.mp4").unlink()
    table = rows("dev")
    table[0][3] = "angre"
    write(meld, "dev", table)
    corpus = datasets.index("meld", str(meld))
    assert [clip_id for clip_id, _ in corpus.rejected] == ["train/dia1_utt1", "dev/dia0_utt0"]
    assert "no such file" in corpus.rejected[0][1]
    assert "did you mean 'anger'" in corpus.rejected[1][1]
    assert len(corpus.folds[0].train) == COUNTS["train"] - 1
    assert len(corpus.folds[0].val) == COUNTS["dev"] - 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "dev_sent_emo.csv").unlink(), "dev_sent_emo.csv: not found; set --config.data.root"),
        (lambda root: (root / "dev_sent_emo.csv").write_text("a,b\n1,2\n"), "no column Utterance, Speaker"),
        (lambda root: (root / "dev_sent_emo.csv").write_bytes(b"Utterance\n\xff\n"), r"not UTF-8 \(byte 10\)"),
        (lambda root: write(root, "dev", []), "none of its rows has a film"),
    ],
)
def test_what_is_wrong_is_said(meld, spoil, message):
    spoil(meld)
    with pytest.raises(AvjaxError, match=message):
        datasets.index("meld", str(meld))
