"""The registry of pretrained files, read from `data/encoders.json`: what each file is and where it comes from.

`data/mirrors.json` lists packages of the Python index that merely carry a file; they are tried last, and the file is
identified by its sha256.

In `files`, null marks a file that is not pinned (`UNPINNED`). `written` holds the contents of the hub's JSON files if
the source lacks them, or for random weights. HSEmotion's B2 was trained on frames of 260x260; DE-III feeds it 224x224
(its section "Implementation Details"), and so does its preprocessor_config.json in `written`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from avjax.encoders.sources import UNPINNED, Entry, File, Hub, Package, Source, Web
from avjax.utils import paths
from avjax.utils.storage import read_json


def _file(entry: Mapping[str, Any] | None) -> File:
    if entry is None:
        return UNPINNED
    return File(entry["sha256"], entry["size"], tuple(map(_file, entry.get("parts", ()))))


def _source(entry: Mapping[str, Any]) -> Source:
    if "hub" in entry:
        return Hub(entry["hub"], entry["revision"])
    return Web(entry["web"], entry["paths"])


def _entry(entry: Mapping[str, Any], mirror: Sequence[str]) -> Entry:
    files = {name: _file(file) for name, file in entry["files"].items()}
    sources = (*map(_source, entry["sources"]), *([Package(tuple(mirror))] if mirror else []))
    return Entry(entry["what"], entry["licence"], files, sources, entry.get("written", {}))


_MIRRORS: Mapping[str, Sequence[str]] = read_json(paths.path("data/mirrors.json"))
REGISTRY: dict[str, Entry] = {
    name: _entry(entry, _MIRRORS.get(name, ())) for name, entry in read_json(paths.path("data/encoders.json")).items()
}
