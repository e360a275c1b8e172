"""Metadata of the public data sets (`data/<corpus>.json`): classes, counts, source and licence.

A data set has the name of its corpus, or `corpus:target` if the corpus has several kinds of labels, such as
`crema_d:crowd`. All targets of a corpus have the same clips, folder and features.
"""

import dataclasses
from collections.abc import Mapping

from avjax.utils import paths
from avjax.utils.storage import read_json


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a public data set.

    Attributes:
      title: its name as published.
      classes: name → published number of clips, None where there is none (regression, multi-label).
      homepage, citation, licence: "" where unknown.
      clips, folds: published numbers, 0 where there is none.
      parts: part of an official split → number of clips.
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
    """Returns the corpus of data set `name`."""
    return name.partition(":")[0]


def target(name: str) -> str:
    """Returns the target of data set `name`, "" for the default target of the corpus."""
    return name.partition(":")[2]


def metadata(name: str) -> Metadata | None:
    """Reads the metadata of data set `name`; None if it is not public, such as `folder`."""
    file = f"data/{corpus(name)}.json"
    if file not in paths.names("data"):
        return None
    fields = read_json(paths.path(file))
    targets = fields.pop("targets", {})
    return Metadata(**fields | (targets[target(name)] if target(name) else {}))
