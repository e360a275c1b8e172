"""Protocols: no part of a fold reaches into another, overlap of speakers is refused or stamped, and all is recorded."""

import dataclasses
import json

import pytest

from avjax import config as configs
from avjax.datasets.base import Fold
from avjax.errors import AvjaxError
from avjax.models.base import Model
from avjax.training import lanes as lane_plans
from avjax.training import protocol
from tests import synthetic

PROTOCOL = configs.settings("configs/etg_folder.py").protocol


def asked(**changes):
    return dataclasses.replace(PROTOCOL, **changes)


def counts(held_out):
    return [{"n_val": n, "speaker_overlap": None} for n in held_out]


def text(name, plan, config, candidates=(), task="single", **more) -> str:
    model = Model(None, None, candidates or ("fusion",), (), task=task, candidates=candidates)
    return protocol.protocol_text(name, plan, config, model, **more)


@pytest.fixture(scope="module")
def features():
    """30 clips of 3 speakers, each speaker with every class."""
    return synthetic.make(clips=30, speakers=3)


def official(features, *folds):
    return dataclasses.replace(features, folds=folds)


# ---- Folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": "abc", "test": "cd"}, "1 clips are in both train and test, such as c"),
        ({"train": "ab", "val": "cd", "test": "cd"}, "2 clips are in both val and test, such as c"),
        ({"train": "abc", "val": "c", "test": "d"}, "1 clips are in both train and val, such as c"),
    ],
    ids=["trained on", "chosen by", "trained and chosen"],
)
def test_a_part_that_reaches_into_another_is_refused(features, parts, message):
    ids = dict(zip("abcd", features.ids, strict=False))
    fold = Fold("1", **{part: tuple(ids[c] for c in letters) for part, letters in parts.items()})
    message = message[:-1] + features.ids["abcd".index(message[-1])]
    with pytest.raises(AvjaxError, match=f"fold 1: {message}; .* must not be tested on"):
        protocol.folds(official(features, fold), asked())


def test_choosing_by_test_clips_cannot_be_configured():
    with pytest.raises(AvjaxError, match=r"protocol.select is 'test'; choose one of val, last"):
        configs.settings("configs/etg_folder.py", protocol__select="test")


def test_folds_that_test_the_same_clips_are_run_one_by_one(features):
    ids = features.ids
    both = official(features, Fold("1", tuple(ids[10:]), tuple(ids[:10])), Fold("2", tuple(ids[15:]), tuple(ids[:15])))
    with pytest.raises(AvjaxError, match=r"10 clips are tested in more than one of the folds 1, 2: .*protocol.only=1"):
        protocol.folds(both, asked())
    assert protocol.folds(both, asked(only="2")) == ([both.folds[1]], "fold 2 alone of 2 folds of the data set")
    with pytest.raises(AvjaxError, match=r"protocol.only is '3'; the folds are 1, 2"):
        protocol.folds(both, asked(only="3"))


# ---- Speakers --------------------------------------------------------------------------------------------------------


def test_a_random_split_of_known_speakers_must_be_asked_for_and_is_stamped(features):
    with pytest.raises(AvjaxError, match=r"3 speakers of a fold are in .*allow_speaker_overlap=True"):
        protocol.folds(features, asked(folds="stratified", fold_count=5))
    config = asked(folds="stratified", fold_count=5, allow_speaker_overlap=True)
    folds, name = protocol.folds(features, config)
    described = text(name, lane_plans.plan(features, folds, (42,), config), config)
    assert described.startswith(
        "SPEAKERS OVERLAP: up to 3 speakers of a fold are in training and in test; 5 stratified folds"
    )


def test_so_must_a_split_of_the_users_own(features):
    clips = [dataclasses.replace(c, split="test" if i % 4 == 0 else "train") for i, c in enumerate(features.clips)]
    with pytest.raises(AvjaxError, match="given train/test split: up to 3 speakers"):
        protocol.folds(dataclasses.replace(features, clips=clips), asked())


def test_a_division_of_the_data_set_itself_is_stamped_and_not_refused(features):
    ids = features.ids
    mixed = official(features, Fold("official", tuple(ids[:20]), tuple(ids[20:])))
    folds, name = protocol.folds(mixed, asked())
    described = text(name, lane_plans.plan(mixed, folds, (42,), asked()), asked())
    assert described.startswith("SPEAKERS OVERLAP: up to 3 speakers")


def test_disjoint_speakers_are_not_stamped(features):
    folds, name = protocol.folds(features, asked())
    assert name == "leave one speaker out (3 speakers)"
    assert "OVERLAP" not in text(name, lane_plans.plan(features, folds, (42,), asked()), asked())


def test_unknown_speakers_cannot_be_seen_to_overlap(features):
    nameless = dataclasses.replace(
        features, clips=[dataclasses.replace(c, speaker=None) for c in features.clips], speakers=[""] * 30
    )
    assert protocol.folds(nameless, asked(folds="stratified"))[1].endswith("the same person may be on both sides)")


# ---- What is said and recorded ---------------------------------------------------------------------------------------


def test_the_record_says_what_was_dropped_and_why(features):
    dropped = dataclasses.replace(features, rejected=(("bad", "no such file"),), dataset="mafw")
    folds, name = protocol.folds(dropped, asked())
    plan = lane_plans.plan(dropped, folds, (42, 43), asked())
    record = protocol.record(dropped, plan, asked(), text(name, plan, asked()))
    assert json.loads(json.dumps(record)) == record
    assert record["clips"] == {"used": 30, "dropped": 1, "published": 9172}
    assert record["dropped"] == [{"clip_id": "bad", "reason": "no such file"}]
    assert record["selection"] == "best validation UAR"
    assert [(f["fold"], f["seed"]) for f in record["folds"]] == plan.names
    for f in record["folds"]:
        assert f["n_train"] + f["n_val"] + f["n_test"] == 30
        assert f["speaker_overlap"] == 0


@pytest.mark.parametrize(
    ("changes", "held_out", "notes", "expected"),
    [
        ({}, [4], ["held out"], "F; held out; epoch: best validation UAR; features standardised on the training clips"),
        ({"select": "last"}, [4], [], "F; epoch: last epoch; features standardised on the training clips"),
        ({}, [0], ["no validation part"], "F; no validation part; epoch: last epoch; features standardised on"),
        ({}, [0], ["no validation part (too few clips)"], "F; no validation part (too few clips); epoch: last epoch; "),
        ({}, [4, 0], ["n"], "F; n; epoch: best validation UAR or, where nothing is held out, last epoch; features"),
        ({"standardise": "speaker"}, [4], [], "F; epoch: best validation UAR; features standardised per speaker over"),
        (
            {"standardise": "enrol"},
            [4],
            ["n"],
            "F; n; epoch: best validation UAR; features standardised per speaker on",
        ),
    ],
)
def test_the_protocols_name_says_how_the_figures_came_about(changes, held_out, notes, expected):
    chosen = asked(**changes)
    plan = lane_plans.LanePlan(lanes=None, names=[], counts=counts(held_out), notes=notes)
    assert text("F", plan, chosen).startswith(expected)
    stamped = text("F", plan, chosen, random=True)
    assert stamped.startswith(f"RANDOM WEIGHTS in the encoders: the figures mean nothing; {expected}")


@pytest.mark.parametrize(
    ("task", "select", "held_out", "expected"),
    [
        ("regression", "val", [4], "F; epoch: best validation CCC; head: best validation CCC; features"),
        ("multilabel", "val", [4], "F; epoch: best validation weighted accuracy; head: best validation weighted acc"),
        ("single", "last", [4], "F; epoch: last epoch; head: video; features"),
        ("single", "val", [0], "F; epoch: last epoch; head: video; features"),
        (
            "single",
            "val",
            [4, 0],
            "F; epoch: best validation UAR or, where nothing is held out, last epoch; "
            "head: best validation UAR or, where nothing is held out, video; features",
        ),
    ],
)
def test_the_protocols_name_says_how_the_head_was_chosen(task, select, held_out, expected):
    config = asked(select=select)
    plan = lane_plans.LanePlan(lanes=None, names=[], counts=counts(held_out), notes=[])
    assert text("F", plan, config, ("video", "audio"), task=task).startswith(expected)
    assert "head:" not in text("F", plan, config, task=task)
