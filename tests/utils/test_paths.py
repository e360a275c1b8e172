"""Shipped files are found by name; the folders of a user's files follow the environment."""

import json
import pathlib

import pytest

from avjax.errors import AvjaxError
from avjax.utils import paths


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "get_config" in paths.path("configs/etg_mafw.py").read_text()
    assert len(json.loads(paths.path("data/mafw.json").read_text())["classes"]) == 11


@pytest.mark.parametrize("name", ["data/nope.json", "/etc/passwd", "../pyproject.toml", "data", "avjax/cli.py"])
def test_what_is_not_shipped_is_refused_with_what_is(name):
    with pytest.raises(AvjaxError, match=r"no such file; avjax ships .*data/mafw\.json"):
        paths.path(name)


def test_places_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_DATA", str(tmp_path))
    monkeypatch.setenv("AVJAX_CACHE", "~/elsewhere")
    assert paths.data_root("mafw") == tmp_path / "mafw"
    assert paths.cache() == pathlib.Path.home() / "elsewhere"
    monkeypatch.delenv("AVJAX_CACHE")
    assert paths.cache() == pathlib.Path.home() / ".cache/avjax"
