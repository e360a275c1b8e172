"""MSP-IMPROV as downloaded: twelve actors in six pairs, each turn rated for valence, arousal and dominance.

Busso et al., IEEE Transactions on Affective Computing 2017. Video and audio files have a code in their names,
`session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.avi`; the ratings are in `Evalution.txt`, which names them UTD-IMPROV.
"""

import re
from pathlib import Path

from avjax.datasets.base import Clip, Corpus, make_corpus
from avjax.errors import AvjaxError
from avjax.utils import media_files
from avjax.utils.tables import number

_RATINGS = ("Evalution.txt", "Evaluation.txt")
# Sentence with its emotion, speaker, scenario, direction of speech and number of the turn.
_CODE = r"(S\d\d[AHNS]-([FM])(0[1-6])-[PRST]-[FM]{2}\d+)"
_NAME = re.compile(rf"(?:MSP|UTD)-IMPROV-{_CODE}", re.ASCII)
_LINE = re.compile(rf"{_NAME.pattern}\.avi\s*;(.*)", re.ASCII)
_VALUES = {"valence": "V", "arousal": "A", "dominance": "D"}
_LOWEST, _HIGHEST = 1.0, 5.0


def index(root: Path) -> Corpus:
    """Reads the ratings and finds the video, and the audio file if there is one, of each rated turn below `root`.

    Ratings of 1 to 5 are scaled to 0 to 1; arousal is stored inverted, and is inverted back. A turn without a video, or
    with a rating that is missing or outside the scale, is rejected with a reason, as is a video without ratings. A
    speaker is, for example, F02, the woman of the second pair; the fold is the pair's session.

    Raises:
      AvjaxError: there is no Evalution.txt, or no turn can be used.
    """
    tables = [p for p in media_files.files(root, ".txt") if p.name in _RATINGS]
    if not tables:
        raise AvjaxError(f"{root}: no {_RATINGS[0]}; set --config.data.root to the folder of the download")
    ratings, videos, wavs = _ratings(tables[0]), _by_code(root, ".avi", ".mp4"), _by_code(root, ".wav")
    clips, reasons = [], {}
    for code in dict.fromkeys((*ratings, *videos)):
        match, clip_id = re.fullmatch(_CODE, code), f"MSP-IMPROV-{code}"
        label, reasons[clip_id] = _label(ratings.get(code))
        clip = Clip(
            id=clip_id,
            path=videos.get(code, root / f"{clip_id}.avi"),
            label=label,
            audio=wavs.get(code),
            speaker=match[2] + match[3],
            gender={"F": "female", "M": "male"}[match[2]],
            fold=str(int(match[3])),
        )
        clips.append(clip)
    return make_corpus("msp_improv", clips, reasons, f"{tables[0]}: rates no video, and there is none", "regression")


def _by_code(root: Path, *suffixes: str) -> dict[str, Path]:
    """Returns turn → its file; of several, the first by path."""
    return {m[1]: p for p in reversed(media_files.files(root, *suffixes)) if (m := _NAME.fullmatch(p.stem))}


def _ratings(path: Path) -> dict[str, str]:
    """Returns turn → text after its name, such as ` N; A:2.4; V:2.6; D:3.0;`. Lines of single raters are skipped."""
    lines = path.read_bytes().decode("latin-1").split("\n")
    return {m[1]: m[4] for line in lines if (m := _LINE.fullmatch(line.strip()))}


def _label(rated: str | None) -> tuple[tuple[float, ...], str]:
    """Returns valence, arousal and dominance from 0 to 1, and why they are unusable ("" if they are usable)."""
    if rated is None:
        return (), f"no line in {_RATINGS[0]}"
    stored = dict(part.split(":", 1) for part in rated.replace(" ", "").split(";") if ":" in part)
    values = []
    for name, letter in _VALUES.items():
        if not _LOWEST <= (rating := number(stored.get(letter, ""))) <= _HIGHEST:
            return (), f"{name} is {stored.get(letter, 'missing')}; expected a number from 1 to 5"
        share = (rating - _LOWEST) / (_HIGHEST - _LOWEST)
        values.append(1 - share if name == "arousal" else share)
    return tuple(values), ""
