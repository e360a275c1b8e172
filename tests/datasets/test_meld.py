"""MELD, on miniatures of its download."""

import csv
from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.datasets.metadata import metadata
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
    """Makes three parts whose dialogue numbers start over, and stray files of the download."""
    for part, folder in FOLDERS.items():
        (tmp_path / folder).mkdir()
        write(tmp_path, part, rows(part))
        for row in rows(part):
            (tmp_path / folder / f"dia{row[5]}_utt{row[6]}.mp4").write_bytes(b"x")
    for stray in ("final_videos_testdia0_utt0.mp4", "._dia0_utt0.mp4", ".DS_Store", "dia99_utt0.mp4"):
        (tmp_path / FOLDERS["test"] / stray).write_bytes(b"x")
    return tmp_path


def test_the_official_division(meld):
    corpus = registry.index("meld", str(meld))
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
    corpus = registry.index("meld", str(meld))
    assert [clip_id for clip_id, _ in corpus.rejected] == ["train/dia1_utt1", "dev/dia0_utt0"]
    assert "no such file" in corpus.rejected[0][1]
    assert "did you mean 'anger'" in corpus.rejected[1][1]
    assert len(corpus.folds[0].train) == COUNTS["train"] - 1
    assert len(corpus.folds[0].val) == COUNTS["dev"] - 1


@pytest.mark.parametrize(
    ("part", "dialogue", "turn", "reason"),
    [("train", 125, 3, "cannot be decoded"), ("dev", 110, 7, "the film is missing"), ("test", 125, 3, "")],
)
def test_films_that_are_known_to_be_broken_are_left_out_even_if_they_are_there(meld, part, dialogue, turn, reason):
    table = rows(part)
    table[1][5:7] = dialogue, turn
    write(meld, part, table)
    (meld / FOLDERS[part] / f"dia{dialogue}_utt{turn}.mp4").write_bytes(b"x")
    corpus = registry.index("meld", str(meld))
    assert corpus.rejected == (((f"{part}/dia{dialogue}_utt{turn}", reason),) if reason else ())
    assert len(corpus.clips) == sum(COUNTS.values()) - bool(reason)


def test_a_table_does_not_lead_out_of_the_folder_of_films(meld):
    (meld / "dia0_utt0.mp4").write_bytes(b"x")
    table = rows("dev")
    table[0][5] = "/../../dia0"
    write(meld, "dev", table)
    ((_, reason),) = registry.index("meld", str(meld)).rejected
    assert reason == "Dialogue_ID or Utterance_ID is no number"


def test_blanks_in_the_header(meld):
    before = registry.index("meld", str(meld))
    path = meld / "dev_sent_emo.csv"
    path.write_text("\ufeff" + path.read_text(encoding="utf-8").replace(",Emotion,", ", Emotion ,"), encoding="utf-8")
    assert registry.index("meld", str(meld)) == before


def test_films_that_were_not_fetched(meld):
    (meld / "train_splits/dia0_utt0.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    ((name, reason),) = registry.index("meld", str(meld)).rejected
    assert (name, reason[:21]) == ("train/dia0_utt0", "a Git LFS pointer, no")


def test_the_published_counts(tmp_path):
    """Makes as many rows as the real tables have, without the two videos that the download lacks."""
    counts = {"train": 9989, "dev": 1109, "test": 2610}
    labels = [name for name, count in metadata("meld").classes.items() for _ in range(count)]
    film = tmp_path / "film"
    film.write_bytes(b"x" * 1000)
    for part, count in counts.items():
        folder = tmp_path / FOLDERS[part]
        folder.mkdir()
        table = [[i, "x", "Joey", labels.pop(), "x", i // 9, i % 9, 1] for i in range(count)]
        write(tmp_path, part, table)
        for row in table:
            (folder / f"dia{row[5]}_utt{row[6]}.mp4").hardlink_to(film)
    corpus = registry.index("meld", str(tmp_path))
    (fold,) = corpus.folds
    assert (len(fold.train), len(fold.val), len(fold.test)) == (9988, 1108, 2610)
    assert {name for name, _ in corpus.rejected} == {"train/dia125_utt3", "dev/dia110_utt7"}
    assert len(corpus.clips) + 2 == metadata("meld").clips
    assert sum((Counter(metadata("meld").classes) - Counter(c.label for c in corpus.clips)).values()) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "dev_sent_emo.csv").unlink(), "dev_sent_emo.csv: not found; set --config.data.root"),
        (lambda root: (root / "dev_sent_emo.csv").write_text("a,b\n1,2\n"), "no column Utterance, Speaker"),
        (
            lambda root: (root / "dev_sent_emo.csv").write_bytes(
                b"Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID\n\xff"
            ),
            "line 2: not UTF-8",
        ),
        (lambda root: write(root, "dev", []), "none of its rows has a video"),
    ],
)
def test_what_is_wrong_is_said(meld, spoil, message):
    spoil(meld)
    with pytest.raises(AvjaxError, match=message):
        registry.index("meld", str(meld))
