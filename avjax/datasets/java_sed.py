"""Java-SED (Arifin et al. 2022): clips whose names say all that is known of them."""

import re
from pathlib import Path

from avjax.datasets.base import GENDERS, Clip, Corpus
from avjax.datasets.fold_tables import gathered
from avjax.datasets.metadata import metadata
from avjax.utils import media_files

# Actor, sentence, emotion, repetition.
_JAVA_SED = re.compile(r"(\d\d)-\d\d-(0[1-6])_\d\d", re.ASCII)


def java_sed(root: Path) -> Corpus:
    """Java-SED as it was downloaded: `dataset-resize/01-01-01_01.mp4`, or such files anywhere below `root`.

    Raises:
      AvjaxError: there is no such file below `root`, or none can be used.
    """
    emotions = tuple(metadata("java_sed").classes)
    found = [(p, m) for p in media_files.files(root, ".mp4") if (m := _JAVA_SED.fullmatch(p.stem))]
    clips = [Clip(p.stem, p, emotions[int(m[2]) - 1], speaker=m[1], gender=GENDERS[int(m[1]) > 5]) for p, m in found]
    return gathered("java_sed", clips, {}, f"{root}: no dataset-resize/01-01-01_01.mp4")
