"""MAFW: 9,172 clips with 11 emotions, or 8,996 with 43 compound emotions (Liu et al., ACM Multimedia 2022).

Both have five official folds. Captions in some of the lists are annotators' descriptions of the emotion; they are
ignored, and never an input.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from avjax.datasets import fold_tables
from avjax.datasets.base import Corpus
from avjax.datasets.metadata import metadata, target
from avjax.errors import AvjaxError

_PLAIN, _CAPTIONED = "no_caption", "with_caption"
# A plain file name: a list must not lead out of the folder of clips. In bytes, as captions are in several encodings.
_LINE = re.compile(rb"([\w-]+)\.mp4\s+(\w+)\s*(?:\t.*)?", re.DOTALL)


def index(root: Path, name: str = "mafw") -> Corpus:
    """Indexes `root/data/clips/*.mp4` by `root/Train & Test Set/single/no_caption/set_{1..5}/{train,test}.txt`.

    "mafw:compound" has the lists of `compound` instead of `single`. If there are none without captions, those of
    `with_caption` are read. A listed clip is rejected with a reason, and is in no fold, if its file is missing or its
    label is not a class. A clip without audio is kept.

    Raises:
      AvjaxError: the layout is not MAFW's (the message names every missing part), a line is not `00025.mp4 anger`,
        no label is a class, no clip exists, or the lists contradict each other: two labels for a clip, a clip twice
        in one fold, not tested exactly once over all folds, or not the same with captions and without.
    """
    splits, clips = root / "Train & Test Set" / (target(name) or "single"), root / "data" / "clips"
    kinds = [kind for kind in (_PLAIN, _CAPTIONED) if (splits / kind).is_dir()] or [_PLAIN]
    paths = {
        (str(fold), part): splits / kinds[0] / f"set_{fold}" / f"{part}.txt"
        for fold in range(1, metadata(name).folds + 1)
        for part in ("train", "test")
    }
    fold_tables.check_present(root, "mafw", (clips, *paths.values()), "'data/clips' and 'Train & Test Set'")
    lists = fold_tables.read(splits / kinds[0], paths, _rows)
    if len(kinds) > 1:
        for path in paths.values():
            _check_captioned(path, splits / _CAPTIONED / path.relative_to(splits / _PLAIN))
    return fold_tables.corpus(name, lists, clips, {n: clips / f"{n}.mp4" for n in lists.labels})


def compound(root: Path) -> Corpus:
    """Indexes MAFW with its 43 compound emotions, such as `anger_disgust`; see `index`."""
    return index(root, "mafw:compound")


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (location, clip name, label) of each line of a fold list; captions are skipped."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            got = line.strip().decode("ascii", "backslashreplace")[:80]
            raise AvjaxError(f"{path}, line {number}: {got!r}; expected a clip and its label: 00025.mp4 anger")
        yield f"{path}, line {number}", match[1].decode(), match[2].decode().lower()


def _check_captioned(plain: Path, captioned: Path) -> None:
    """Checks that the list with captions, if there is one, has the same clips and labels."""
    if not captioned.is_file():
        return
    this, other = ({name: label for _, name, label in _rows(path)} for path in (captioned, plain))
    for name in sorted(this.keys() | other.keys()):
        got, expected = this.get(name, "not listed"), other.get(name, "not listed")
        if got != expected:
            raise AvjaxError(
                f"{captioned}: {name} is {got}, but {expected} in {plain}; the lists of one download agree: take "
                f"it anew, or take {_CAPTIONED} away"
            )
