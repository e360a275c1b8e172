"""The demo corpus: its plan, its faces, its voice, and that nothing beside face and voice gives the class away."""

import collections

import numpy as np
import pytest
from rich.console import Console

from avjax.datasets import mafw
from avjax.datasets.metadata import metadata
from avjax.demo import corpus, face, voice
from avjax.errors import AvjaxError
from avjax.features import clip as clip_features
from avjax.media import audio, faces, video
from avjax.utils import storage

QUIET = Console(quiet=True)


def test_plan_is_balanced_and_folds_are_disjoint_in_speakers():
    plans = corpus.plans()
    assert len(plans) == 220
    assert len({p.name for p in plans}) == 220
    assert set(collections.Counter(p.emotion for p in plans).values()) == {20}
    assert set(collections.Counter((p.emotion, p.fold) for p in plans).values()) == {4}
    folds = collections.defaultdict(set)
    for plan in plans:
        folds[plan.speaker].add(plan.fold)
    assert sorted(folds) == list(range(10))
    assert all(len(f) == 1 for f in folds.values())
    # Names in order must not be classes in order.
    assert max(collections.Counter(p.emotion for p in plans[:44]).values()) < 12


def test_layout_is_that_of_mafw(tmp_path):
    corpus.write_lists(tmp_path)
    (tmp_path / "data/clips").mkdir(parents=True)
    for plan in corpus.plans():
        corpus.clip_path(tmp_path, plan).write_bytes(b"a clip")
    made = mafw.index(tmp_path)
    assert {c.id: c.label for c in made.clips} == {p.name: p.emotion for p in corpus.plans()}
    for fold in made.folds:
        assert set(fold.test) == {p.name for p in corpus.plans() if str(p.fold) == fold.name}
        assert len(fold.train) + len(fold.test) == 220
    assert not made.rejected
    assert "not MAFW" in (tmp_path / "README.txt").read_text()


def test_a_clip_is_made_anew_to_the_byte_and_shows_a_talking_face(tmp_path):
    plan = corpus.plans()[7]
    paths = [corpus.clip_path(tmp_path / name, plan) for name in "ab"]
    for path in paths:
        corpus.write_clip(path.parents[2], plan)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    frames = video.read_frames(paths[0], count=100)
    samples = audio.read_audio(paths[0])
    assert 1.5 < len(samples) / audio.SAMPLE_RATE < 2.9
    # Video and audio end together, up to a frame and the padding of the audio codec.
    assert abs(frames.times[-1] - len(samples) / audio.SAMPLE_RATE) < 0.25
    assert frames.images.shape[1:] == (224, 224, 3)
    assert audio.prosody(audio.analyse(samples)).f0_median_hz > 0


def test_make_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    few = corpus.plans()[:3]
    monkeypatch.setattr(corpus, "plans", lambda: few)
    existing = corpus.clip_path(tmp_path, few[1])
    existing.parent.mkdir(parents=True)
    existing.write_bytes(b"made before")
    (existing.parent / f".{few[0].name}.mp4.123.part").write_bytes(b"of a killed run")
    corpus.make(tmp_path, QUIET)
    assert existing.read_bytes() == b"made before"
    assert sorted(p.name for p in existing.parent.iterdir()) == [".lock", *sorted(f"{p.name}.mp4" for p in few)]


def test_two_do_not_make_it_at_once(tmp_path):
    with (
        storage.only_writer(tmp_path / "data/clips", ""),
        pytest.raises(AvjaxError, match="another process is writing"),
    ):
        corpus.make(tmp_path, QUIET)


def test_a_folder_that_cannot_be_written_is_a_plain_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AvjaxError, match=r"cannot be written.*AVJAX_CACHE"):
        corpus.make(tmp_path / "file" / "demo", QUIET)


def test_a_clip_that_cannot_be_made_is_a_plain_error(tmp_path, monkeypatch):
    broken = corpus.Plan("00001", "boredom", 0, 1)
    monkeypatch.setattr(corpus, "plans", lambda: [broken])
    with pytest.raises(AvjaxError, match=r"00001.mp4: cannot be made: KeyError: 'boredom'"):
        corpus.make(tmp_path, QUIET)


def test_every_emotion_is_one_of_mafw_with_units_that_exist():

    assert list(corpus.EMOTIONS) == list(metadata("mafw").classes)
    assert all(set(units) <= set(face.UNITS) for units, _ in corpus.EMOTIONS.values())
    # No two classes have both the same expression and the same manner.
    assert len({(tuple(sorted(u.items())), m) for u, m in corpus.EMOTIONS.values()}) == 11


@pytest.mark.weights
@pytest.mark.parametrize(
    ("unit", "blendshape"),
    [
        ("inner_brow_raiser", "browInnerUp"),
        ("outer_brow_raiser", "browOuterUpLeft"),
        ("brow_lowerer", "browDownRight"),
        ("upper_lid_raiser", "eyeWideRight"),
        ("lid_tightener", "eyeSquintLeft"),
        ("upper_lip_raiser", "mouthUpperUpLeft"),
        ("lip_corner_puller", "mouthSmileLeft"),
        ("lip_pucker", "mouthPucker"),
        ("lip_stretcher", "mouthStretchRight"),
        ("jaw_drop", "jawOpen"),
        ("blink", "eyeBlinkLeft"),
    ],
)
def test_units_move_what_they_are_named_after(tracker, unit, blendshape):
    column = faces.BLENDSHAPES.index(blendshape)
    rest, moved = (shapes(tracker, strength)[column] for strength in ({}, {unit: 1.0}))
    assert moved > rest + 0.1


@pytest.mark.weights
def test_one_sided_smile_is_one_sided(tracker):
    left, right = (faces.BLENDSHAPES.index(f"mouthSmile{side}") for side in ("Left", "Right"))
    change = shapes(tracker, {"one_lip_corner_puller": 1.0}) - shapes(tracker, {})
    assert change[left] > change[right] + 0.2


@pytest.fixture(scope="module")
def tracker():
    with faces.FaceTracker(clip_features.landmarker()) as made:
        yield made


def shapes(tracker, strengths) -> np.ndarray:
    image = face.portrait().render(strengths)
    track = tracker.track(video.Frames(image[None], np.zeros(1)))
    assert track.present.all()
    return track.blendshapes[0]


@pytest.mark.parametrize("semitones", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("rate", [2.8, 5.8])
def test_voice_has_the_pitch_and_rate_that_were_asked_for(semitones, rate):
    measured = spoken(voice.Manner(semitones, rate, 5.0))
    assert measured.f0_median_hz == pytest.approx(175 * 2 ** (semitones / 12), rel=0.08)
    assert measured.syllables_per_second == pytest.approx(rate, rel=0.15)


def test_voice_has_the_stress_that_was_asked_for():
    weak, strong = (spoken(voice.Manner(0.0, 4.1, stress)).stress_db for stress in (1.0, 11.0))
    assert weak < 6 < 10 < strong


def spoken(manner: voice.Manner) -> audio.Prosody:
    speaker = voice.Speaker(pitch=175, formants=1.0, tilt=-9)
    samples, openness = voice.speak(speaker, manner, 1.7, np.random.default_rng(3))
    assert samples.shape == openness.shape
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(1)
    assert openness.min() >= 0
    assert openness.max() <= 1
    return audio.prosody(audio.analyse(np.pad(0.05 * samples, 2000).astype(np.float32)))


def test_length_loudness_and_lead_in_are_drawn_without_regard_to_the_class():
    """The draws come before anything that depends on the class; what is left of it after mixing is loudness."""
    lengths, levels, labels = [], [], []
    for plan in corpus.plans():
        samples, openness = corpus._audio(plan, np.random.default_rng([corpus._SEED, int(plan.name)]))
        lengths.append((len(samples), np.argmax(openness > 0)))
        levels.append(10 * np.log10(np.mean(samples**2)))
        labels.append(list(corpus.EMOTIONS).index(plan.emotion))
    values = np.column_stack([lengths, levels])
    for column in values.T:
        groups = [column[np.array(labels) == c] for c in range(11)]
        assert (
            _variance_explained(groups) < 0.11
        )  # 10 degrees of freedom of 219 explain 0.046 by chance; 0.11 is p = 0.005


def _variance_explained(groups) -> float:
    """Computes the proportion of variance between groups (eta squared)."""
    every = np.concatenate(groups)
    between = sum(len(g) * (g.mean() - every.mean()) ** 2 for g in groups)
    return between / np.sum((every - every.mean()) ** 2)
