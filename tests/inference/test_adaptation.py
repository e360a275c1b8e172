"""Caches that learn people: corrections that count at once, and the curve of what a few labelled clips bring."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from avjax.datasets.base import Clip, Fold
from avjax.errors import AvjaxError
from avjax.evaluation import fewshot
from avjax.evaluation import fewshot_cache as caches
from avjax.evaluation.predictor import Caches, Heads
from avjax.features.store import Features
from avjax.inference import adaptation
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.models.base import Model
from avjax.settings import ProtocolSettings
from avjax.training import lanes as lane_plans
from tests import clips, tiny_run

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLASSES, WIDTH = ("calm", "fear", "joy"), 8
TEXT = np.eye(3, WIDTH, dtype=np.float32)
QUIET = Console(quiet=True)
PEOPLE, CLIPS = 6, 18  # of each person
SETTINGS = {"shots": 4, "tune_steps": 1, "tune_rate": 1e-3, "reader": "cache"}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def features() -> Features:
    count = PEOPLE * CLIPS
    label = np.tile(np.arange(3, dtype=np.int32), count // 3)
    who = [f"p{i // CLIPS}" for i in range(count)]
    ids = [f"{person}/{i % CLIPS:02d}" for i, person in enumerate(who)]
    made = [Clip(i, None, CLASSES[y], speaker=p) for i, y, p in zip(ids, label, who, strict=True)]
    return Features("made", CLASSES, (), "", ids, made, label, who, {}, {}, {}, {}, {}, constants={"classes": TEXT})


def represented(given: Features, offset: float = 1.5, noise: float = 0.15) -> dict[str, np.ndarray]:
    """(2 lanes, clips, d): each person shows all classes with an offset of their own."""
    rng, out = np.random.default_rng(3), {}
    person = np.array([int(name[1:]) for name in given.speakers])
    for m in ("video", "audio"):
        own = offset * rng.normal(size=(2, PEOPLE, 3))[:, person]
        x = 0.2 * rng.normal(size=(2, len(person), WIDTH))
        x[:, :, :3] += 2 * TEXT[given.label][None, :, :3] + own + noise * rng.normal(size=own.shape)
        out[m] = unit(x).astype(np.float32)
    return out


def finished(workdir: pathlib.Path, given: Features | None = None, **more) -> runs.Run:
    """A run of two lanes that leave three people out each, with what its files say of features and caches."""
    given = given or features()
    found = represented(given, **more)
    groups = [[i for i in given.ids if (int(i[1]) % 2) == half] for half in (0, 1)]
    folds = tuple(Fold(n, tuple(groups[1 - k]), tuple(groups[k])) for k, n in enumerate("12"))
    how = ProtocolSettings(validation=0.0, standardise="none")
    plan = lane_plans.plan(given, folds, (5,), how)
    outputs = fewshot.fit(found, given, plan, SETTINGS)
    fewshot.write(workdir, outputs, found, given, plan)
    return runs.Run(
        "W", "made", "two folds", CLASSES, "lite", "both", None, {}, np.zeros(2), {}, (("1", 5), ("2", 5)), {},
        predictor=Caches(tuple(outputs.caches)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("W")
    return workdir, finished(workdir)


def without_caches(run: runs.Run) -> runs.Run:
    return dataclasses.replace(run, predictor=Heads(Model(None, None, (), ())))


# ---- The cache of a user -------------------------------------------------------------------------------------------


def test_a_new_cache_has_clips_of_the_run_and_the_middle_of_its_lanes(whole):
    workdir, run = whole
    cache = adaptation.new_cache(workdir, run)
    assert np.bincount(cache.label).tolist() == [SETTINGS["shots"]] * 3
    assert (cache.classes, cache.origin) == (CLASSES, run.predictor.caches[0].origin)
    assert cache.beta == np.median([c.beta for c in run.predictor.caches])
    for m in ("video", "audio"):
        assert cache.alpha[m] == np.median([c.alpha[m] for c in run.predictor.caches])
        found, place = represented(features())[m], [features().ids.index(i) for i in cache.ids]
        expected = np.concatenate(list(found[:, place]), -1) / np.sqrt(2)
        np.testing.assert_allclose(cache.keys[m], expected, atol=1e-6)
    np.testing.assert_allclose(cache.text, np.concatenate([TEXT, TEXT], -1) / np.sqrt(2), atol=1e-6)
    assert [CLASSES.index(features().clips[features().ids.index(i)].label) for i in cache.ids] == cache.label.tolist()


def test_a_joined_cache_scores_as_the_mean_of_the_lanes_does_without_votes(whole):
    workdir, run = whole
    cache = dataclasses.replace(adaptation.new_cache(workdir, run), alpha={"video": 0.0, "audio": 0.0})
    found = represented(features())
    joined = caches.predict(cache, fewshot.joined(found))
    lanes = [caches.zero_shot(c, {m: x[i] for m, x in found.items()}) for i, c in enumerate(run.predictor.caches)]
    np.testing.assert_allclose(joined, np.mean(lanes, 0), atol=1e-6)


def test_a_cache_is_opened_where_it_is_and_begun_where_it_is_not(whole, tmp_path):
    workdir, run = whole
    path = tmp_path / "mine.npz"
    first = adaptation.open_cache(path, workdir, run)
    assert not path.exists()
    caches.save(caches.remove(first, first.ids[:1]), path)
    assert adaptation.open_cache(path, workdir, run).ids == first.ids[1:]
    assert adaptation.read_cache(path, run).ids == first.ids[1:]


def test_caches_of_other_runs_and_damaged_ones_are_refused(whole, tmp_path):
    workdir, run = whole
    path = tmp_path / "mine.npz"
    cache = adaptation.new_cache(workdir, run)
    caches.save(dataclasses.replace(cache, origin="another"), path)
    with pytest.raises(AvjaxError, match=r"mine\.npz: a cache of another run than W"):
        adaptation.read_cache(path, run)
    caches.save(dataclasses.replace(cache, classes=("a", "b", "c")), path)
    with pytest.raises(AvjaxError, match=r"mine\.npz: a cache of another run than W"):
        adaptation.open_cache(path, workdir, run)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AvjaxError, match=r"mine\.npz: not a readable cache"):
        adaptation.open_cache(path, workdir, run)
    with pytest.raises(AvjaxError, match=r"gone\.npz"):
        adaptation.read_cache(tmp_path / "gone.npz", run)


def test_a_run_without_a_cache_cannot_be_adapted(whole, tmp_path):
    workdir, run = whole[0], without_caches(whole[1])
    for call in (
        lambda: adaptation.new_cache(workdir, run),
        lambda: adaptation.read_cache(tmp_path / "any", run),
        lambda: adaptation.curve(workdir, run, (1,), 1),
    ):
        with pytest.raises(AvjaxError, match=r"run W has no cache to adapt; .*configs/emoasst_folder\.py"):
            call()


# ---- Corrections ---------------------------------------------------------------------------------------------------


def table(folder: pathlib.Path, *rows: str, header: str = "file,label,id") -> pathlib.Path:
    for row in rows:
        if not row.startswith("gone"):
            (folder / row.split(",")[0]).write_bytes(b"something")
    path = folder / "corrections.csv"
    path.write_text("\n".join([header, *rows]))
    return path


def test_rows_that_cannot_be_used_are_told_and_the_others_kept(whole, tmp_path):
    path = table(tmp_path, "a.mp4,joy,p0/00", "b.mp4,Fear,b", "c.mp4,,c", "gone.mp4,calm,d", "e.mp4,calm,")
    found, rejected = adaptation.corrections(path, whole[1])
    assert [(clip.id, clip.label) for clip in found] == [("p0/00", "joy"), ("e", "calm")]
    assert dict(rejected) == {"b": "label 'Fear'; did you mean 'fear'?", "c": "no label", "d": "no such file"}


def test_a_table_of_nothing_useful_is_an_error(whole, tmp_path):
    with pytest.raises(AvjaxError, match=r"corrections\.csv: none of its rows can be used; the first: b: label 'fury'"):
        adaptation.corrections(table(tmp_path, "b.mp4,fury,b"), whole[1])
    with pytest.raises(AvjaxError, match=r"the task 'regression'; expected a column label"):
        adaptation.corrections(table(tmp_path, "b.mp4,0.5", header="file,value:joy"), whole[1])
    with pytest.raises(AvjaxError, match="not found"):
        adaptation.corrections(tmp_path / "gone.csv", whole[1])


@pytest.fixture
def measured(monkeypatch):
    """Clips are measured as what is in the run, by their ids; "noise" cannot be."""
    given = features()
    vectors = represented(given)

    def measure(run, wanted, console, *, clip_seconds):
        known = [clip for clip in wanted if clip.id != "noise"]
        rejected = [(clip.id, "not a media file") for clip in wanted if clip.id == "noise"]
        if not known:
            return None, [], rejected
        return dataclasses.replace(given, ids=[c.id for c in known], clips=known), [], rejected

    def places(found):
        return [given.ids.index(i.removeprefix("new ")) for i in found.ids]

    monkeypatch.setattr(prediction, "measure", measure)
    monkeypatch.setattr(
        prediction, "read_outputs", lambda run, found: {m: x[:, places(found)] for m, x in vectors.items()}
    )
    return given


def named(given: Features, *ids: str, label: str) -> list[Clip]:
    return [Clip(i, None, label) for i in ids]


def test_a_corrected_clip_counts_at_once(whole, measured):
    workdir, run = whole
    cache = dataclasses.replace(adaptation.new_cache(workdir, run), alpha={"video": 1.0, "audio": 1.0}, beta=500.0)
    place = next(i for i, name in enumerate(measured.ids) if name not in cache.ids and measured.label[i] == 0)
    name = measured.ids[place]
    before = prediction.probabilities(adaptation.with_cache(run, cache), dataclasses.replace(measured, ids=[name]))[0]
    grown, rejected = adaptation.add_clips(
        cache, run, [*named(measured, name, label="fear"), Clip("noise", None, "joy")], QUIET, clip_seconds=9.0
    )
    assert rejected == [("noise", "not a media file")]
    assert len(grown.ids) == len(cache.ids) + 1
    assert grown.label[grown.ids.index(name)] == 1
    assert (dict(grown.alpha), grown.beta) == (dict(cache.alpha), cache.beta)
    after = prediction.probabilities(adaptation.with_cache(run, grown), dataclasses.replace(measured, ids=[name]))[0]
    assert after[1] > before[1]
    assert after.argmax() == 1
    again, _ = adaptation.add_clips(grown, run, named(measured, name, label="joy"), QUIET, clip_seconds=9.0)
    assert (len(again.ids), again.label[again.ids.index(name)]) == (len(grown.ids), 2)


def test_without_a_usable_clip_the_cache_stays(whole, measured):
    workdir, run = whole
    cache = adaptation.new_cache(workdir, run)
    same, rejected = adaptation.add_clips(cache, run, [Clip("noise", None, "joy")], QUIET, clip_seconds=9.0)
    assert same is cache
    assert len(rejected) == 1


# ---- The curve -----------------------------------------------------------------------------------------------------


def uar(scores: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean([np.mean(scores[label == c].argmax(-1) == c) for c in np.unique(label)]))


def test_the_curve_rises_where_people_differ(whole):
    points = adaptation.curve(*whole, (4, 1, 2), 5)
    assert [p.shots for p in points] == [0, 1, 2, 4]
    means = [p.mean for p in points]
    assert (np.diff(means) > -1e-9).all()
    assert means[-1] > means[0] + 0.05
    assert points[-1].better >= 0.5
    for point in points:
        assert sorted(point.uar) == [f"p{i}" for i in range(PEOPLE)]
        assert point.mean == pytest.approx(np.mean([*point.uar.values()]))
        assert point.spread == pytest.approx(np.std([*point.uar.values()]))
        assert point.better == np.mean([point.uar[person] > points[0].uar[person] for person in point.uar])


def test_more_shots_than_clips_leave_one_of_each_class_to_test(whole):
    (none, many), (_, five) = (adaptation.curve(*whole, (k,), 3) for k in (99, 5))
    assert many.uar == five.uar, "of six clips of a class five are set aside at most"
    assert none.shots == 0


def test_points_are_of_the_lanes_that_have_not_seen_the_person(whole, monkeypatch):
    """What is asked is watched: who is tested is no entry, the same clips at every point, as the lane itself scores."""
    asked, predict = [], caches.predict
    monkeypatch.setattr(caches, "predict", lambda cache, rows: asked.append((cache, rows)) or predict(cache, rows))
    points = adaptation.curve(*whole, (1, 2), 2)
    given, found = features(), represented(features())
    assert len(asked) == PEOPLE * 2 * 3
    for first in range(0, len(asked), 3):
        lane = [c is asked[first][0] for c in whole[1].predictor.caches].index(True)
        sets = []
        for k, (cache, rows) in zip((0, 1, 2), asked[first : first + 3], strict=True):
            sets.append([np.flatnonzero((found["video"][lane] == x).all(-1)).item() for x in rows["video"]])
            tested = {given.ids[i] for i in sets[-1]}
            assert not tested & set(cache.ids)
            assert {given.speakers[i] for i in sets[-1]} < {f"p{i}" for i in range(lane, PEOPLE, 2)}
            entered = set(cache.ids) - set(whole[1].predictor.caches[lane].ids)
            assert len(entered) == 3 * k
            assert {i.split("/")[0] for i in entered} <= {given.speakers[i] for i in sets[-1]}
            assert len(tested) == CLIPS - 3 * 2
        assert sets[0] == sets[1] == sets[2]
        person = given.speakers[sets[0][0]]
        own = {m: x[lane][sets[0]] for m, x in found.items()}
        scores = uar(predict(whole[1].predictor.caches[lane], own), given.label[sets[0]])
        asked[first] += (person, scores)
    for person, value in points[0].uar.items():
        assert value == pytest.approx(np.mean([a[3] for a in asked[::3] if a[2] == person]))


def test_the_curve_is_the_same_again_and_another_by_another_seed(whole):
    assert adaptation.curve(*whole, (1,), 2) == adaptation.curve(*whole, (1,), 2)
    assert adaptation.curve(*whole, (1,), 2) != adaptation.curve(*whole, (1,), 2, seed=1)


@pytest.mark.parametrize(("shots", "draws"), [((), 1), ((0, 1), 1), ((1,), 0), ((-1,), 3)])
def test_a_curve_of_nothing_is_told(whole, shots, draws):
    with pytest.raises(AvjaxError, match="expected 1 or more of each"):
        adaptation.curve(*whole, shots, draws)


def test_a_curve_needs_people_and_clips(tmp_path):
    unknown = dataclasses.replace(features(), speakers=["p0", *[""] * (PEOPLE * CLIPS - 1)])
    run = finished(tmp_path, features())
    kept = fewshot.read_representations(tmp_path)
    np.savez(tmp_path / fewshot.REPRESENTATIONS, **kept | {"speaker": np.array(unknown.speakers)})
    with pytest.raises(AvjaxError, match="its clips have no speakers"):
        adaptation.curve(tmp_path, run, (1,), 1)
    someone = np.array(["q", *kept["speaker"][1:]])
    np.savez(tmp_path / fewshot.REPRESENTATIONS, **kept | {"speaker": someone})
    assert all(sorted(point.uar) == sorted(set(kept["speaker"])) for point in adaptation.curve(tmp_path, run, (1,), 1))
    alone = np.array([f"q{i}" for i in range(PEOPLE * CLIPS)])
    np.savez(tmp_path / fewshot.REPRESENTATIONS, **kept | {"speaker": alone})
    with pytest.raises(AvjaxError, match="nobody has two clips of a class"):
        adaptation.curve(tmp_path, run, (1,), 1)


# ---- By the real commands ------------------------------------------------------------------------------------------


def command(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", *map(os.fspath, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, run directory) of EmoAsst on the clips of the tiny run."""
    data, store, _ = tiny_run.make(tmp_path_factory)
    workdir = tmp_path_factory.mktemp("emoasst") / "W"
    changes = {"protocol.fold_count": 2, "train.epochs": 2, "train.epochs_per_call": 2, "train.seeds": "1,2"}
    changes |= {"model.settings.width": 16, "model.settings.heads": 2, "model.settings.inner": 16}
    command(
        "avjax.train", "--config=configs/emoasst_folder.py", f"--config.data.features={store}", "--workdir", workdir,
        *(f"--config.{k}={v}" for k, v in changes.items()),
    )  # fmt: skip
    return data, workdir


def answers(workdir, *arguments) -> dict[str, dict]:
    said = json.loads(command("avjax.predict", "--workdir", workdir, "--json", *arguments).stdout)
    return {clip["file"]: clip for clip in said["clips"]}


@pytest.mark.thorough
@pytest.mark.budget(150)
@pytest.mark.weights
def test_a_run_answers_as_it_stored(trained):
    data, workdir = trained
    found = answers(workdir, "--fold=2", "--seed=1", data)
    with np.load(workdir / "predictions.npz") as rows:
        chosen = (rows["fold"] == "2") & (rows["seed"] == 1)
        logits = rows["logits_both_cache"][chosen].astype(np.float64)
        ids = rows["clip_id"][chosen].tolist()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for clip_id, row in zip(ids, shares, strict=True):
        (said,) = (a for file, a in found.items() if pathlib.Path(file).with_suffix("").as_posix().endswith(clip_id))
        np.testing.assert_allclose([*said["probabilities"].values()], row, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.budget(150)
@pytest.mark.weights
def test_a_corrected_clip_is_answered_by_its_label(trained, tmp_path):
    data, workdir = trained
    clip, cache = data / "take0" / "1.mp4", tmp_path / "mine.npz"
    new = clips.write_mp4(tmp_path / "new.mp4", seconds=0.5, hz=250) or tmp_path / "new.mp4"
    first = answers(workdir, new)[str(new)]
    other = next(c for c in tiny_run.CLASSES if c != first["predicted"])
    path = tmp_path / "corrections.csv"
    path.write_text(f"file,label\nnew.mp4,{other}\ngone.mp4,deep\n")
    run = ("avjax.adapt", "--workdir", workdir, "--cache", cache)
    done = command(*run, "--labels", path)
    assert "gone: no such file" in done.stderr
    assert "new" in done.stdout
    kept = caches.load(cache)
    # As many clips of each class as the fullest cache of a lane has.
    shots = max(np.bincount(caches.load(p).label).max() for p in (workdir / "caches").glob("*.npz"))
    count = len(tiny_run.CLASSES) * shots + 1
    assert len(kept.ids) == count
    corrected = answers(workdir, "--cache", cache, new)[str(new)]
    assert corrected["probabilities"][other] >= first["probabilities"][other]
    strong = dataclasses.replace(kept, alpha=dict.fromkeys(kept.alpha, 1.0), beta=44.0)
    caches.save(strong, cache)
    assert answers(workdir, "--cache", cache, new)[str(new)]["predicted"] == other
    # Errors leave the file as it is.
    before = cache.read_bytes()
    path.write_text("file,label\ngone.mp4,deep\n")
    assert "none of its 1 rows can be used" in command(*run, "--labels", path, code=2).stderr
    assert f"is not among the {count} entries" in command(*run, "--remove", "nobody", code=2).stderr
    assert cache.read_bytes() == before
    command(*run, "--remove", "new", "--fit")
    assert "new" not in caches.load(cache).ids
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(before[:-100])
    for arguments in ((*run[:-1], damaged), ("avjax.predict", "--workdir", workdir, "--cache", damaged, clip)):
        assert "damaged.npz: not a readable cache" in command(*arguments, code=2).stderr
    assert damaged.read_bytes() == before[:-100]


@pytest.mark.thorough
@pytest.mark.weights
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give --cache"),
        (("--cache=C", "--curve=1"), "give --cache"),
        (("--curve=1", "--fit"), "--labels, --remove and --fit change a cache"),
        (("--curve=one",), "--curve is one; expected numbers"),
        (("--curve=1",), "its clips have no speakers"),
    ],
)
def test_commands_that_make_no_sense_are_told(trained, arguments, says):
    assert says in command("avjax.adapt", "--workdir", trained[1], *arguments, code=2).stderr
