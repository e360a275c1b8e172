"""MMSA's pickles."""

import pickle

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.features.tables import mmsa


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
    columns = mmsa.mmsa(path)
    assert columns["id"] == ["a$_$0", "a$_$1", "b$_$0", "c$_$5"]
    assert columns["part"] == ["train", "train", "valid", "test"]
    assert {len(column) for column in columns.values()} == {4}
    assert "more" not in columns
    assert columns["audio"][3].shape == (3, 2)


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
