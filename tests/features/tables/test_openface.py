"""OpenFace's tables."""

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.features.tables import openface
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


def test_a_real_table_of_openface():
    path = REAL / "openface_pyfeat_csv/OpenFace_Test.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set AVJAX_TEST_DATA)")
    table = openface.openface(path)
    shapes = {"timestamp": (100,), "confidence": (100,), "au": (100, 17), "present": (100, 18), "pose": (100, 6)}
    assert {name: array.shape for name, array in table.items()} == shapes | {"mask": (100,)}
    assert table["mask"].all()
    assert 0 < table["au"].max() <= 5
    assert set(np.unique(table["present"])) == {0, 1}
    with path.open() as file:
        names, first = ([cell.strip() for cell in next(file).split(",")] for _ in range(2))
    cells = dict(zip(names, map(float, first), strict=True))
    assert table["au"][0, 4] == np.float32(cells["AU06_r"])
    assert table["present"][0, 16] == cells["AU28_c"]
    assert table["pose"][0, 2] == np.float32(cells["pose_Tz"])


@pytest.mark.parametrize("glue", [",", ", "])
def test_frames_without_a_face_are_masked(tmp_path, glue):
    rows = [{"AU12_r": 2.5}, {"success": 0}, {"confidence": 0.49}, {"AU01_r": "-nan(ind)", "AU12_r": 1}, {"AU28_c": 1}]
    table = openface.openface(write_openface(tmp_path / "a.csv", rows, glue=glue))
    assert table["mask"].tolist() == [True, False, False, False, True]
    assert table["au"][:, openface.UNITS.index("AU12")].tolist() == [2.5, 0, 0, 1, 0]
    assert table["present"][4].nonzero()[0].tolist() == [16]
    assert np.isfinite(table["au"]).all()


def test_of_several_faces_the_surest_is_followed(tmp_path):
    faces = [{"face_id": f, "confidence": c, "AU12_r": f + 1} for f, c in ((0, 0.6), (1, 0.9), (0, 0.99), (1, 0.8))]
    table = openface.openface(write_openface(tmp_path / "a.csv", faces, ("face_id", *HEADER)))
    np.testing.assert_allclose(table["confidence"], [0.9, 0.8])
    assert table["au"].max(-1).tolist() == [2, 2]


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
