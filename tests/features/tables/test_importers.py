"""What others publish: OpenFace's tables, folders of arrays, MMSA's pickles and lists of folds."""

import gzip
import pickle

import numpy as np
import pytest

from avjax.datasets import published_folds
from avjax.datasets.published_folds import Listed
from avjax.errors import AvjaxError
from avjax.features.tables import mmsa, openface, readers
from tests.conftest import REAL

HEADER = (
    *("frame", "timestamp", "confidence", "success"),
    *(f"pose_{n}" for n in ("Tx", "Ty", "Tz", "Rx", "Ry", "Rz")),
    *(f"{unit}_r" for unit in openface.UNITS),
    *(f"{unit}_c" for unit in openface.PRESENT),
)


def write_openface(path, rows, header=HEADER, glue=", "):
    """`rows` are dicts of what is not 0 or, of success and confidence, 1."""
    usual = dict.fromkeys(header, 0) | {"success": 1, "confidence": 1}
    lines = [glue.join(header), *(glue.join(str((usual | row)[name]) for name in header) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def listed(folder):
    if not (REAL / folder).is_dir():
        pytest.skip(f"the lists are not at {REAL} (set AVJAX_TEST_DATA)")
    return published_folds.fold_lists(REAL / folder)


# ---- OpenFace -----------------------------------------------------------------------------------------------------


def test_a_real_table_of_openface():
    path = REAL / "openface_pyfeat_csv/OpenFace_Test.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set AVJAX_TEST_DATA)")
    found = openface.openface(path)
    shapes = {"timestamp": (100,), "confidence": (100,), "au": (100, 17), "present": (100, 18), "pose": (100, 6)}
    assert {name: array.shape for name, array in found.items()} == shapes | {"mask": (100,)}
    assert found["mask"].all()
    assert 0 < found["au"].max() <= 5
    assert set(np.unique(found["present"])) == {0, 1}
    with path.open() as file:
        names, first = ([cell.strip() for cell in next(file).split(",")] for _ in range(2))
    cells = dict(zip(names, map(float, first), strict=True))
    assert found["au"][0, 4] == np.float32(cells["AU06_r"])
    assert found["present"][0, 16] == cells["AU28_c"]
    assert found["pose"][0, 2] == np.float32(cells["pose_Tz"])


@pytest.mark.parametrize("glue", [",", ", "])
def test_frames_without_a_face_are_masked(tmp_path, glue):
    rows = [{"AU12_r": 2.5}, {"success": 0}, {"confidence": 0.49}, {"AU01_r": "-nan(ind)", "AU12_r": 1}, {"AU28_c": 1}]
    found = openface.openface(write_openface(tmp_path / "a.csv", rows, glue=glue))
    assert found["mask"].tolist() == [True, False, False, False, True]
    assert found["au"][:, openface.UNITS.index("AU12")].tolist() == [2.5, 0, 0, 1, 0]
    assert found["present"][4].nonzero()[0].tolist() == [16]
    assert np.isfinite(found["au"]).all()


def test_of_several_faces_the_surest_is_followed(tmp_path):
    faces = [{"face_id": f, "confidence": c, "AU12_r": f + 1} for f, c in ((0, 0.6), (1, 0.9), (0, 0.99), (1, 0.8))]
    found = openface.openface(write_openface(tmp_path / "a.csv", faces, ("face_id", *HEADER)))
    np.testing.assert_allclose(found["confidence"], [0.9, 0.8])
    assert found["au"].max(-1).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (HEADER[:-1], [{}], "no column AU45_c; expected a table of OpenFace 2"),
        (HEADER, [], "no frame in it"),
        (("a", "a"), [], "two columns have one name"),
    ],
)
def test_a_table_that_is_not_openfaces_is_a_clear_error(tmp_path, header, rows, message):
    with pytest.raises(AvjaxError, match=message):
        openface.openface(write_openface(tmp_path / "a.csv", rows, header))


# ---- Folders of arrays --------------------------------------------------------------------------------------------


def test_a_folder_of_arrays(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(3))
    np.save(tmp_path / "two.npy", np.ones((4, 3)))
    (tmp_path / "three").mkdir()
    for name, value in (("00010", [2, 2]), ("00002", [1, 1])):
        np.save(tmp_path / "three" / f"{name}.npy", value)
    assert readers.frames(tmp_path / "one.npy").tolist() == [0, 1, 2]
    assert readers.frames(tmp_path / "two.npy").tolist() == [[1] * 3] * 4
    assert readers.frames(tmp_path / "three").tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}], object), "expected an .npy of numbers"),
        (np.array(["a"]), "expected numbers"),
        (np.zeros((2, 2, 2)), r"\(2, 2, 2\); expected numbers, \(d,\) or \(steps, d\)"),
    ],
)
def test_what_is_no_array_of_numbers_is_a_clear_error(tmp_path, value, message):
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    with pytest.raises(AvjaxError, match=message):
        readers.frames(tmp_path / "a.npy")


@pytest.mark.parametrize("frames", [{}, {"1": [1, 2], "2": [1, 2, 3]}, {"1": np.ones((2, 3))}])
def test_frames_of_a_clip_are_vectors_of_one_length(tmp_path, frames):
    (tmp_path / "clip").mkdir()
    for name, value in frames.items():
        np.save(tmp_path / "clip" / name, value)
    with pytest.raises(AvjaxError, match="expected one vector for each frame, all as long"):
        readers.frames(tmp_path / "clip")


# ---- MMSA ---------------------------------------------------------------------------------------------------------


def part(*ids):
    arrays = {
        "text": np.ones((len(ids), 2, 4)),
        "audio": np.ones((len(ids), 3, 2)),
        "vision": np.ones((len(ids), 3, 1)),
    }
    return {"id": list(ids), "raw_text": [f"said {i}" for i in ids], "regression_labels": np.ones(len(ids))} | arrays


def test_the_parts_of_an_mmsa_file_are_rows_of_one_table(tmp_path):
    path = tmp_path / "aligned_50.pkl"
    parts = {"train": part("a$_$0", "a$_$1") | {"more": [1, 2]}, "valid": part("b$_$0"), "test": part("c$_$5")}
    path.write_bytes(pickle.dumps(parts))
    found = mmsa.mmsa(path)
    assert found["id"] == ["a$_$0", "a$_$1", "b$_$0", "c$_$5"]
    assert found["part"] == ["train", "train", "valid", "test"]
    assert {len(column) for column in found.values()} == {4}
    assert "more" not in found
    assert found["audio"][3].shape == (3, 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([1], "no train, valid, test in it; expected the three parts of MMSA"),
        ({"train": part("a$_$0"), "test": part("a$_$0")}, "no valid in it"),
        ({word: {"id": ["a$_$0"]} for word in mmsa.PARTS}, "train has no raw_text, text, audio, vision"),
        (dict.fromkeys(mmsa.PARTS, part("a_0")), "train has the id 'a_0'; expected VIDEO"),
        (dict.fromkeys(mmsa.PARTS, part("a$_$0") | {"id": []}), "columns of unequal length"),
    ],
)
def test_what_is_no_mmsa_file_is_a_clear_error(tmp_path, parts, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(parts))
    with pytest.raises(AvjaxError, match=message):
        mmsa.mmsa(tmp_path / "a.pkl")


# ---- Lists of folds -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("line", ["/far/faces/a_aligned /far/sound/a.wav 0", "a.mp4 0", "a.mp4,0"])
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
        ("label_consensus_1.csv", b"FileName,x,SpkrID,Split_Set\na,much,1,Train", "expected FileName, a share"),
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
    # Of one division nobody expects that its training clips are tested.
    assert published_folds.problems([Listed("", "train", {"a": "x"}), Listed("", "test", {"b": "x"})]) == []


def test_a_clip_that_stands_twice_in_a_list_is_kept_once(tmp_path):
    (tmp_path / "test.txt").write_text("a.mp4 x\nb.mp4 x\na.mp4 y\n")
    (found,) = published_folds.fold_lists(tmp_path)
    assert found == Listed("", "test", {"a": "x", "b": "x"}, (("a", "y"),))
    assert published_folds.problems([found])[-1] == "1 clips have two labels, such as a: x and y"
