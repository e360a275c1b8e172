"""Java-SED (Arifin et al. 2022): speech of ten actors; file names give labels and actors."""

import re
from pathlib import Path

from avjax.datasets.base import GENDERS, Clip, Corpus, make_corpus
from avjax.datasets.metadata import metadata
from avjax.utils import media_files

# Actor, sentence, emotion, repetition.
_NAME = re.compile(r"(\d\d)-\d\d-(0[1-6])_\d\d", re.ASCII)


def index(root: Path) -> Corpus:
    """Indexes Java-SED as downloaded: `dataset-resize/01-01-01_01.mp4`, or such files anywhere below `root`.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(metadata("java_sed").classes)
    matches = [(p, m) for p in media_files.files(root, ".mp4") if (m := _NAME.fullmatch(p.stem))]
    clips = [Clip(p.stem, p, emotions[int(m[2]) - 1], speaker=m[1], gender=GENDERS[int(m[1]) > 5]) for p, m in matches]
    return make_corpus("java_sed", clips, {}, f"{root}: no dataset-resize/01-01-01_01.mp4")
