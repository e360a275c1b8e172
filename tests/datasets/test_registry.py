"""Errors of all data sets for a folder with another layout."""

import pytest

from avjax.datasets import registry
from avjax.errors import AvjaxError


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("ravdess", "no Actor_01/01-01-….mp4"),
        ("crema_d", "no VideoFlash/1001_DFA_ANG_XX.flv"),
        ("java_sed", "no dataset-resize/01-01-01_01.mp4"),
        ("msp_improv", "no Evalution.txt"),
    ],
)
def test_a_folder_without_such_files_says_what_was_expected(tmp_path, name, lacking):
    (tmp_path / "VideoFlash").mkdir()
    (tmp_path / "VideoFlash/film.flv").write_bytes(b"x")
    with pytest.raises(AvjaxError, match=f"{tmp_path}: {lacking}; set --config.data.root"):
        registry.index(name, str(tmp_path))
