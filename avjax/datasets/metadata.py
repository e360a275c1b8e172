"""Metadata of the public data sets (`data/<corpus>.json`): classes, counts, source and licence.

A data set is named by its corpus, or `corpus:target` where the corpus has several kinds of labels, such as
`crema_d:crowd`. All targets of a corpus are of the same clips, and share its folder and its features.
"""

import dataclasses
from collections.abc import Mapping

from avjax.utils import paths
from avjax.utils.storage import read_json


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a public data set.

    Attributes:
      title: its name as published; homepage, citation, licence: "" where unknown.
      classes: name → published number of clips, None where it has no such number (a value, a label of several).
      clips, folds: published numbers, 0 where there is none; parts: of an official division, part → number of clips.
      broken: id of a clip that is known to be unusable → why.
    """

    title: str
    classes: Mapping[str, int | None]
    homepage: str = ""
    citation: str = ""
    licence: str = ""
    clips: int = 0
    folds: int = 0
    parts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    broken: Mapping[str, str] = dataclasses.field(default_factory=dict)


def corpus(name: str) -> str:
    """The corpus of data set `name`."""
    return name.partition(":")[0]


def target(name: str) -> str:
    """The target of data set `name`, "" for its corpus's own."""
    return name.partition(":")[2]


def metadata(name: str) -> Metadata | None:
    """Reads the metadata of data set `name`; None of one that is not public, such as `folder`."""
    file = f"data/{corpus(name)}.json"
    if file not in paths.names("data"):
        return None
    known = read_json(paths.path(file))
    targets = known.pop("targets", {})
    return Metadata(**known | (targets[target(name)] if target(name) else {}))
