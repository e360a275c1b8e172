"""Which data a configuration trains on: those it names, else those at the default path, else the demo corpus."""

import pytest
from rich.console import Console

from avjax import config as configs
from avjax.demo import corpus
from avjax.errors import AvjaxError
from avjax.features import extract as extraction
from avjax.features import store
from avjax.training import data
from avjax.utils import paths
from tests import synthetic


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AVJAX_DATA", raising=False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the demo corpus and of extraction, which writes made-up features."""
    calls = []

    def extract(dataset, preset, *, root, out, random):
        calls.append((dataset, root, out, *(["random"] if random else [])))
        synthetic.write_store(store.Path(out), synthetic.make(clips=12))

    monkeypatch.setattr(corpus, "make", lambda root, console: calls.append("demo"))
    monkeypatch.setattr(extraction, "extract", extract)
    return calls


def obtain(**changes) -> str:
    """Returns what was printed while features were obtained."""
    console = Console(record=True, width=100, quiet=False)
    data.obtain(configs.settings("configs/etg_mafw.py", **changes), console)
    return console.export_text()


def test_demo_corpus_stands_in_where_nothing_is_named_or_found(home, asked):
    output = obtain()
    root = corpus.folder()
    assert asked == ["demo", ("demo", str(root), str(root / "features"))]
    assert "demo corpus (synthetic), not MAFW" in output
    assert "--config.data.root" in output
    obtain()
    assert asked[2:] == ["demo"]  # what is extracted is not extracted again


def test_data_at_the_default_place_are_extracted(home, asked):
    (home / "avjax_data" / "mafw").mkdir(parents=True)
    output = obtain()
    assert asked == [("mafw", "", str(paths.cache() / "features" / "mafw"))]
    assert "demo" not in output


def test_random_weights_are_asked_for_by_their_key(home, asked):
    (home / "avjax_data" / "mafw").mkdir(parents=True)
    obtain(weights__random=True)
    assert asked[0][3:] == ("random",)


def test_features_at_the_default_place_are_used(home, asked):
    synthetic.write_store(paths.cache() / "features" / "mafw", synthetic.make(clips=12))
    obtain()
    assert asked == []


def test_an_extraction_that_was_begun_is_no_reason_for_the_demo_corpus(home, asked):
    (paths.cache() / "features" / "mafw" / "staged").mkdir(parents=True)
    with pytest.raises(AvjaxError, match="no finished feature store"):
        obtain()


@pytest.mark.parametrize("finished", [False, True])
def test_a_root_that_is_set_and_wrong_is_an_error(home, asked, finished):
    if finished:
        synthetic.write_store(home / "F", synthetic.make(clips=12))
    with pytest.raises(AvjaxError, match="nowhere: no such folder"):
        obtain(data__root=str(home / "nowhere"), data__features=str(home / "F"))
    assert asked == []


def test_a_feature_store_that_is_set_and_wrong_is_an_error(home, asked):
    with pytest.raises(AvjaxError, match="no finished feature store"):
        obtain(data__features=str(home / "nowhere"))
    assert asked == []


def test_a_data_folder_in_the_environment_that_is_wrong_is_an_error(home, asked, monkeypatch):
    monkeypatch.setenv("AVJAX_DATA", str(home / "nowhere"))
    with pytest.raises(AvjaxError, match=r"AVJAX_DATA is .*nowhere"):
        obtain()


def test_no_stand_in_for_a_folder_of_clips(home, asked):
    with pytest.raises(AvjaxError, match="no feature store named"):
        data.obtain(configs.settings("configs/etg_folder.py"), Console())
    assert asked == []
