"""The registry of pretrained files, read from `data/encoders.json`: what each is and where it comes from.

`data/mirrors.json` lists packages of the Python index that merely carry a file; they are tried last, and the file is
known by its sha256.

`files`: null is a file that is not pinned (`UNPINNED`). `written`: the contents of the hub's JSON files where the
source does not bring them, or for weights drawn at random. HSEmotion's B2 was trained on frames of 260x260; DE-III
gives it 224x224 (its section "Implementation Details"), and so does its preprocessor_config.json there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from avjax.encoders.sources import UNPINNED, Entry, File, Hub, Package, Source, Web
from avjax.utils import paths
from avjax.utils.storage import read_json


def _file(stated: Mapping[str, Any] | None) -> File:
    if stated is None:
        return UNPINNED
    return File(stated["sha256"], stated["size"], tuple(map(_file, stated.get("parts", ()))))


def _source(stated: Mapping[str, Any]) -> Source:
    if "hub" in stated:
        return Hub(stated["hub"], stated["revision"])
    return Web(stated["web"], stated["paths"])


def _entry(stated: Mapping[str, Any], mirror: Sequence[str]) -> Entry:
    files = {name: _file(file) for name, file in stated["files"].items()}
    sources = (*map(_source, stated["sources"]), *([Package(tuple(mirror))] if mirror else []))
    return Entry(stated["what"], stated["licence"], files, sources, stated.get("written", {}))


_MIRRORS: Mapping[str, Sequence[str]] = read_json(paths.path("data/mirrors.json"))
REGISTRY: dict[str, Entry] = {
    name: _entry(stated, _MIRRORS.get(name, ())) for name, stated in read_json(paths.path("data/encoders.json")).items()
}
