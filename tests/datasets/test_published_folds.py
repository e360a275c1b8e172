"""Published fold lists."""

import gzip

import pytest

from avjax.datasets import published_folds
from avjax.datasets.published_folds import Listed
from avjax.errors import AvjaxError
from tests.conftest import REAL


def listed(folder):
    if not (REAL / folder).is_dir():
        pytest.skip(f"the lists are not at {REAL} (set AVJAX_TEST_DATA)")
    return published_folds.fold_lists(REAL / folder)


@pytest.mark.parametrize(
    ("folder", "clips", "folds", "tested"),
    [
        ("S2D/DFEW", 11697, 5, [2341, 2341, 2340, 2339, 2336]),
        ("S2D/MAFW/anno/single", 9172, 5, [1839, 1837, 1833, 1832, 1831]),
        ("S2D/MAFW/anno/compound", 8996, 5, [1818, 1809, 1798, 1788, 1783]),
        ("HiCMAE/crema-d", 7437, 5, [1463, 1470, 1475, 1474, 1555]),
        ("HiCMAE/ravdess", 1440, 6, [240] * 6),
    ],
)
def test_public_lists_that_test_every_clip_once(folder, clips, folds, tested):
    lists = listed(f"dfew_mafw_msp_ravdess_folds/{folder}")
    assert published_folds.problems(lists) == []
    assert len({one.fold for one in lists}) == folds
    assert len({clip for one in lists for clip in one.clips}) == clips
    assert [len(one.clips) for one in lists if one.part == "test"] == tested
    assert sum(tested) == clips


def test_dfews_first_fold_and_mafws_names():
    dfew = {(one.fold, one.part): one.clips for one in listed("dfew_mafw_msp_ravdess_folds/S2D/DFEW")}
    assert len(dfew["1", "train"]) == 9356
    assert list(dfew["1", "test"].items())[:2] == [("00001", "1"), ("00002", "2")]
    mafw = listed("dfew_mafw_msp_ravdess_folds/S2D/MAFW/anno/single")
    assert len({label for one in mafw for label in one.clips.values()}) == 11  # of the .txt; the .csv has numbers
    compound = listed("dfew_mafw_msp_ravdess_folds/S2D/MAFW/anno/compound")
    assert "disgust_helplessness_disappointment" in compound[0].clips.values()


def test_of_msp_improv_validation_is_the_test():
    lists = listed("dfew_mafw_msp_ravdess_folds/HiCMAE/msp-improv")
    assert len({clip for one in lists for clip in one.clips}) == 7787
    assert "MSP-IMPROV-S01A-F01-P-FM01" in lists[0].clips
    counts = (916, 1328, 1622, 1044, 1407, 1470)
    assert published_folds.problems(lists) == [
        f"fold {fold}: val and test are the same {count} clips" for fold, count in enumerate(counts, 1)
    ]


def test_vavls_partitions_of_crema_d_overlap():
    lists = listed("cremad_labels_splits")
    assert len({clip for one in lists for clip in one.clips}) == 5820
    assert [(one.fold, one.part, len(one.clips)) for one in lists[:3]] == [
        ("1", "train", 4043),
        ("1", "test", 899),
        ("1", "val", 878),
    ]
    assert lists[0].clips["1026_IEO_ANG_HI"] == "angry"
    several, never = published_folds.problems(lists)
    assert several.startswith("782 clips are tested in several folds")
    assert never.startswith("2267 clips are tested in no fold")


def test_lists_of_ogm_have_no_fold(tmp_path):
    for name in ("ogm_train.csv", "ogm_test.csv"):
        if not (REAL / "cremad_labels_splits" / name).is_file():
            pytest.skip(f"the lists are not at {REAL} (set AVJAX_TEST_DATA)")
        (tmp_path / name).symlink_to(REAL / "cremad_labels_splits" / name)
    lists = published_folds.fold_lists(tmp_path)
    assert [(one.fold, one.part, len(one.clips)) for one in lists] == [("", "test", 744), ("", "train", 6698)]
    assert lists[0].clips["1041_TIE_NEU_XX"] == "NEU"
    assert published_folds.problems(lists) == []


def test_several_data_sets_in_one_folder_are_an_error():
    with pytest.raises(AvjaxError, match="are both test of fold 1; name the folder of one data set"):
        listed("dfew_mafw_msp_ravdess_folds")


@pytest.mark.parametrize("line", ["/far/faces/a_aligned /far/audio/a.wav 0", "a.mp4 0", "a.mp4,0"])
def test_forms_of_a_line(tmp_path, line):
    folder = tmp_path / "split01"
    folder.mkdir()
    (folder / "test.csv.gz").write_bytes(gzip.compress(line.encode() + b"\r\n\r\n"))
    assert published_folds.fold_lists(tmp_path) == [Listed("1", "test", {"a": "0"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.csv", b"a,0", "no list of folds"),
        ("train.txt", b"", "no line in it"),
        ("train.txt", b"a.mp4", "the line 'a.mp4'; expected a clip and its label"),
        ("train.txt", b"/far away/a /far away/a.wav 0", "expected a clip and its label"),
        ("train.txt", b"a\xe9 0", "line 1: not UTF-8; save the table as UTF-8"),
        ("train.csv.gz", b"no gzip", "cannot be read .*; take the file anew"),
        ("label_consensus_1.csv", b"FileName,x,SpkrID,Split_Set\na,much,1,Train", "expected FileName, a column"),
        ("label_consensus_1.csv", b"FileName,x,SpkrID,Split_Set\na,1,1,Later", "Split_Set is 'later'; expected Train"),
    ],
)
def test_what_is_no_list_is_a_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AvjaxError, match=message):
        published_folds.fold_lists(tmp_path)


def test_what_is_wrong_with_lists_is_said():
    lists = [
        Listed("1", "train", {"a": "x", "b": "x", "c": "x"}, (("a", "x"),)),
        Listed("1", "test", {"a": "x", "d": "y"}),
        Listed("2", "train", {"a": "x", "e": "y"}),
        Listed("2", "test", {"d": "y", "b": "y"}),
    ]
    assert published_folds.problems(lists) == [
        "fold 1: 1 clips are in train and test, such as a",
        "1 clips are tested in several folds, such as d",
        "2 clips are tested in no fold, such as c",
        "1 times a list has a clip twice, such as a",
        "1 clips have two labels, such as b: x and y",
    ]
    # The training clips of a single split need not be tested.
    assert published_folds.problems([Listed("", "train", {"a": "x"}), Listed("", "test", {"b": "x"})]) == []


def test_a_clip_that_stands_twice_in_a_list_is_kept_once(tmp_path):
    (tmp_path / "test.txt").write_text("a.mp4 x\nb.mp4 x\na.mp4 y\n")
    (repeating,) = published_folds.fold_lists(tmp_path)
    assert repeating == Listed("", "test", {"a": "x", "b": "x"}, (("a", "y"),))
    assert published_folds.problems([repeating])[-1] == "1 clips have two labels, such as a: x and y"
