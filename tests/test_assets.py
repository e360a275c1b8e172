"""Shipped files are found by name; the places of a user's files follow the environment."""

import json
import pathlib

import pytest

from avjax import assets
from avjax.errors import AvjaxError


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "get_config" in assets.path("configs/etg_mafw.py").read_text()
    assert len(json.loads(assets.path("data/mafw.json").read_text())["classes"]) == 11


@pytest.mark.parametrize("name", ["data/nope.json", "/etc/passwd", "../pyproject.toml", "data", "avjax/cli.py"])
def test_what_is_not_shipped_is_refused_with_what_is(name):
    with pytest.raises(AvjaxError, match=r"no such file; avjax ships .*data/mafw\.json"):
        assets.path(name)


def test_places_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_DATA", str(tmp_path))
    monkeypatch.setenv("AVJAX_CACHE", "~/elsewhere")
    assert assets.data_root("mafw") == tmp_path / "mafw"
    assert assets.cache() == pathlib.Path.home() / "elsewhere"
    monkeypatch.delenv("AVJAX_CACHE")
    assert assets.cache() == pathlib.Path.home() / ".cache/avjax"
