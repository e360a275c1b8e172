"""The emotion-aware sentence: its words, its grammar, and what it must never say."""

import csv
import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avjax.errors import AvjaxError
from avjax.text import action_units, prosody, template
from tests.conftest import REAL

FULL = template.Parts(
    "a man sitting in a car", "lowered brows and pressed lips", "I can't do it", "fast", "high", "weak"
)
FIELDS = [field.name for field in dataclasses.fields(template.Parts)]


def always(*rows: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(rows, np.float32), np.ones(len(rows), bool)


# -- action units ---------------------------------------------------------------------------------------------------


def test_strongest_first_and_grammatical():
    names = ["AU1", "AU12", "AU25"]
    assert action_units.describe(*always([1.0, 3.0, 0.0]), names) == "pulled-up lip corners and raised inner brows"
    assert (
        action_units.describe(*always([1.5, 1.0, 4.0]), names)
        == "parted lips, raised inner brows and pulled-up lip corners"
    )
    assert action_units.describe(*always([0.0, 1.2, 0.9]), names) == "pulled-up lip corners"


def test_threshold_is_inclusive_and_an_option():
    names = ["AU4"]
    assert action_units.describe(*always([1.0]), names) == "lowered brows"
    assert action_units.describe(*always([0.99]), names) == "a neutral face"
    assert action_units.describe(*always([0.99]), names, threshold=0.5) == "lowered brows"


def test_a_burst_counts_though_its_mean_is_low():
    """Two active frames of ten make a 90th percentile of 3, but a mean of .6."""
    intensities = np.zeros((10, 1), np.float32)
    intensities[:2] = 3.0
    assert action_units.describe(intensities, np.ones(10, bool), ["AU9"]) == "a wrinkled nose"
    intensities[1:] = 0.0
    assert action_units.describe(intensities, np.ones(10, bool), ["AU9"]) == "a neutral face"


def test_frames_without_a_face_are_not_read():
    intensities = np.array([[5.0, np.nan], [0.0, 2.0], [5.0, 0.0]], np.float32)
    assert action_units.describe(intensities, np.array([False, True, False]), ["AU1", "AU2"]) == "raised outer brows"
    assert action_units.describe(intensities, np.zeros(3, bool), ["AU1", "AU2"]) is None
    assert action_units.describe(np.zeros((0, 2)), np.zeros(0, bool), ["AU1", "AU2"]) is None


def test_at_most_six_and_ties_keep_the_column_order():
    names = list(action_units.PHRASES)
    text = action_units.describe(*always([2.0] * len(names)), names)
    assert text == (
        "raised inner brows, raised outer brows, lowered brows, raised upper lids, raised cheeks and tightened lids"
    )
    assert action_units.describe(*always([2.0] * len(names)), names, at_most=1) == "raised inner brows"


def test_blinking_is_never_named_and_does_not_count():
    names = ["AU45", "AU43", "AU6"]
    assert action_units.describe(*always([5.0, 5.0, 1.0]), names, at_most=1) == "raised cheeks"
    assert action_units.describe(*always([5.0, 5.0, 0.0]), names) == "a neutral face"


def test_phrases_are_distinct_noun_phrases_that_join():
    assert len(set(action_units.PHRASES.values())) == len(action_units.PHRASES) == 20
    assert not action_units.BLINKING & set(action_units.PHRASES)
    for phrase in action_units.PHRASES.values():
        # A singular noun has its article, a plural has none.
        assert re.fullmatch(r"a (?:\w+ )+(?:nose|lip|chin|jaw)|(?:[\w-]+ )+(?:brows|lids|cheeks|corners|lips)", phrase)


@pytest.mark.parametrize(
    ("intensities", "present", "names", "message"),
    [
        (np.zeros((3, 2)), np.ones(4, bool), ["AU1", "AU2"], r"shape \(3, 2\)"),
        (np.zeros((3, 2)), np.ones(3, bool), ["AU1"], "1 names"),
        (np.zeros((3, 1)), np.ones((3, 1), bool), ["AU1"], r"\(3, 1\)"),
        (np.zeros((3, 2)), np.ones(3, bool), ["AU01_r", "AU2"], "AU01_r"),
        (np.array([[np.nan, 1.0]]), np.ones(1, bool), ["AU1", "AU2"], "finite number in AU1:"),
    ],
)
def test_bad_measurements_are_refused(intensities, present, names, message):
    with pytest.raises(AvjaxError, match=message):
        action_units.describe(intensities, present, names)


def test_real_openface_output():
    """A hundred frames of a calm face: nothing reaches 1, and the strongest of the rest come in order."""
    path = REAL / "openface_pyfeat_csv" / "OpenFace_Test.csv"
    if not path.is_file():
        pytest.skip(f"no OpenFace output at {path}")
    rows = list(csv.DictReader(path.read_text().splitlines(), skipinitialspace=True))
    present = np.array([row["success"] == "1" for row in rows])
    columns = [column for column in rows[0] if re.fullmatch(r"AU\d+_r", column)]
    names = [f"AU{int(column[2:4])}" for column in columns]
    intensities = np.array([[float(row[column]) for column in columns] for row in rows], np.float32)
    assert present.sum() == 100
    assert action_units.describe(intensities, present, names) == "a neutral face"
    assert (
        action_units.describe(intensities, present, names, threshold=0.6)
        == "lowered brows, raised outer brows and raised inner brows"
    )


# -- prosody --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f0", "word"), [(139.9, "low"), (140.0, "normal"), (180.0, "normal"), (220.0, "normal"), (220.1, "high")]
)
def test_pitch_of_an_unknown_speaker(f0, word):
    assert prosody.pitch_word(f0, None) == word


def test_pitch_is_relative_to_a_known_speaker():
    """The same 200 Hz is high for a low voice and low for a high one; exactly two semitones are still normal."""
    assert [prosody.pitch_word(200.0, median) for median in (110.0, 200.0, 300.0)] == ["high", "normal", "low"]
    up = 2 ** (2 / 12)
    assert [prosody.pitch_word(f0, 200.0) for f0 in (200 * up, 200 / up)] == ["normal", "normal"]
    assert [prosody.pitch_word(f0, 200.0) for f0 in (200 * up + 0.01, 200 / up - 0.01)] == ["high", "low"]


@pytest.mark.parametrize(
    ("rate", "word"), [(3.29, "slow"), (3.3, "normal"), (5.0, "normal"), (5.01, "fast"), (None, None)]
)
def test_rate(rate, word):
    assert prosody.rate_word(rate) == word


@pytest.mark.parametrize(
    ("db", "word"),
    [(-3.0, "weak"), (5.9, "weak"), (6.0, "moderate"), (10.0, "moderate"), (10.1, "strong"), (None, None)],
)
def test_stress(db, word):
    assert prosody.stress_word(db) == word


def test_bounds_are_options():
    assert prosody.pitch_word(200.0, None, bounds_hz=(100.0, 190.0)) == "high"
    assert prosody.pitch_word(210.0, 200.0, semitones=0.5) == "high"
    assert prosody.rate_word(4.0, bounds=(4.5, 6.0)) == "slow"
    assert prosody.stress_word(4.0, bounds_db=(1.0, 3.0)) == "strong"


def test_nothing_measured_gives_no_word():
    assert prosody.pitch_word(None, 200.0) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: prosody.pitch_word(0.0, None),
        lambda: prosody.pitch_word(200.0, float("nan")),
        lambda: prosody.rate_word(float("inf")),
        lambda: prosody.rate_word(0.0),
        lambda: prosody.stress_word(float("-inf")),
    ],
)
def test_impossible_measurements_are_refused(call):
    with pytest.raises(AvjaxError, match=r"expected a finite number.*or None where it could not be measured"):
        call()


# -- template -------------------------------------------------------------------------------------------------------


def test_complete_parts_give_the_template_to_the_letter():
    assert template.sentence(FULL) == (
        "a man sitting in a car. Their facial expressions reveal lowered brows and pressed lips. "
        "The translated speech says 'I can't do it'. "
        "The speech rate is fast, The pitch is high, and the stress is weak."
    )


def test_sources_of_table_vi():
    assert template.sentence(FULL, "video") == (
        "a man sitting in a car. Their facial expressions reveal lowered brows and pressed lips."
    )
    assert template.sentence(FULL, "audio") == (
        "The translated speech says 'I can't do it'. "
        "The speech rate is fast, The pitch is high, and the stress is weak."
    )
    with pytest.raises(AvjaxError, match=r"'audiovisual'.*both, audio, video"):
        template.sentence(FULL, "audiovisual")


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (("rate",), "The speech rate is fast."),
        (("pitch",), "The pitch is high."),
        (("stress",), "The stress is weak."),
        (("rate", "pitch"), "The speech rate is fast, and the pitch is high."),
        (("rate", "stress"), "The speech rate is fast, and the stress is weak."),
        (("pitch", "stress"), "The pitch is high, and the stress is weak."),
        (("face",), "Their facial expressions reveal lowered brows and pressed lips."),
        ((), ""),
    ],
)
def test_missing_parts_leave_no_trace(kept, text):
    assert template.sentence(template.Parts(**{name: getattr(FULL, name) for name in kept})) == text


def well_formed(text: str) -> None:
    """What holds for every sentence, whatever its parts."""
    assert text == text.strip()
    assert text.isprintable()
    assert not re.search(r"  |\.\.|,\.|, \.| ,|\bNone\b|\band\.", text)
    assert text == "" or text.endswith(".")


SPOKEN = {"transcript", "rate", "pitch", "stress"}


@pytest.mark.parametrize("source", template.SOURCES)
@pytest.mark.parametrize("kept", itertools.product([False, True], repeat=6))
def test_every_combination_reads_well(kept, source):
    missing = [name for name, keep in zip(FIELDS, kept, strict=True) if not keep]
    full = dataclasses.replace(FULL, transcript="leave me alone")  # no apostrophe: quotes can be counted
    parts = dataclasses.replace(full, **dict.fromkeys(missing))
    text = template.sentence(parts, source)
    well_formed(text)
    allowed = {"both": set(FIELDS), "audio": SPOKEN, "video": set(FIELDS) - SPOKEN}[source]
    for name in FIELDS:
        assert (getattr(full, name) in text) == (name in allowed and name not in missing)
    assert not set("[]()") & set(text)
    assert text.count("'") == (2 if full.transcript in text else 0)
    assert all(clause[0].isupper() for clause in re.split(r"(?<=\.) ", text) if clause not in ("", f"{FULL.scene}."))


messy = st.none() | st.text(
    st.sampled_from("ab Z.,!?'\"’“”…\n\r\t\x00\x92\x85\u2028\ud800é漢[") | st.characters(), max_size=30
)
parts_of_any_text = st.builds(template.Parts, *[messy] * 6)


@given(parts_of_any_text, st.sampled_from(template.SOURCES))
def test_any_text_gives_one_clean_line(parts, source):
    text = template.sentence(parts, source)
    assert text == text.strip()
    assert text == "" or text.endswith(".")
    assert text.isprintable()
    assert "  " not in text
    assert ".." not in text
    text.encode()  # stored as UTF-8: no lone surrogates
    assert bool(text) == any(
        any(c.isalnum() for c in value or "")
        for name, value in dataclasses.asdict(parts).items()
        if source == "both" or (name in SPOKEN) == (source == "audio")
    )


@given(parts_of_any_text)
def test_both_is_the_union_of_the_sources(parts):
    video, audio = template.sentence(parts, "video"), template.sentence(parts, "audio")
    assert template.sentence(parts, "both") == " ".join(filter(None, [video, audio]))


@pytest.mark.parametrize(
    ("spoken", "shown"),
    [
        ("I don't know.", "I don't know"),
        ("What?!", "What?!"),
        ("I thought...", "I thought…"),
        ("He said 'go away' and I can't.", 'He said "go away" and I can\'t'),
        ("‘Go’, she said, “now”", '"Go", she said, "now"'),
        ("It\x92s\x85 fine", "It's… fine"),
        ("two\nlines\tand  more", "two lines and more"),
        ("The dogs' bowl", "The dogs' bowl"),
    ],
)
def test_transcripts_stay_readable(spoken, shown):
    assert template.sentence(template.Parts(transcript=spoken)) == f"The translated speech says '{shown}'."


@pytest.mark.parametrize("blank", ["", "  ", "...", "?", "\n", '""'])
def test_a_part_without_words_is_missing(blank):
    assert template.sentence(template.Parts(*[blank] * 6)) == ""


def test_scene_ends_once():
    for scene in ("a dark room.", "a dark room. . ", "a dark room...", "a dark room!", "a dark room,"):
        assert template.sentence(template.Parts(scene=scene)) == "a dark room."


def test_words_fit_the_template_end_to_end():
    """The words that the two other files make are the parts that this one takes."""
    face = action_units.describe(*always([0.0, 2.0, 3.0]), ["AU1", "AU6", "AU12"])
    parts = template.Parts(
        None, face, None, prosody.rate_word(6.0), prosody.pitch_word(250.0, 200.0), prosody.stress_word(8.0)
    )
    assert template.sentence(parts) == (
        "Their facial expressions reveal pulled-up lip corners and raised cheeks. "
        "The speech rate is fast, The pitch is high, and the stress is moderate."
    )


def test_the_constant_query_is_a_sentence():
    assert template.CONSTANT
    well_formed(template.CONSTANT)
