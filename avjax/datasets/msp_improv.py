"""MSP-IMPROV as it was downloaded: twelve actors in six pairs, each turn rated for valence, arousal and dominance.

Busso et al., IEEE Transactions on Affective Computing 2017. Films and sounds carry their codes in their names,
`session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.avi`; the ratings are in `Evalution.txt`, whose films are called UTD-IMPROV.
"""

import re
from pathlib import Path

from avjax.datasets.base import Clip, Corpus, make_corpus
from avjax.errors import AvjaxError
from avjax.utils import media_files
from avjax.utils.tables import number

_RATINGS = ("Evalution.txt", "Evaluation.txt")
# Sentence and its emotion, speaker, scenario, who speaks to whom and the number of the turn.
_CODE = r"(S\d\d[AHNS]-([FM])(0[1-6])-[PRST]-[FM]{2}\d+)"
_NAME = re.compile(rf"(?:MSP|UTD)-IMPROV-{_CODE}", re.ASCII)
_LINE = re.compile(rf"{_NAME.pattern}\.avi\s*;(.*)", re.ASCII)
_VALUES = {"valence": "V", "arousal": "A", "dominance": "D"}
_LOWEST, _HIGHEST = 1.0, 5.0


def index(root: Path) -> Corpus:
    """Reads the ratings and finds the film, and the sound file where there is one, of each rated turn below `root`.

    Ratings of 1 to 5 become values from 0 to 1; arousal is stored flipped, and is turned round. A turn without a film,
    or with a rating that is missing or outside the scale, is rejected with a reason, as is a film that is not rated.
    The speaker is such as F02, the woman of the second pair; the fold is the pair's session.

    Raises:
      AvjaxError: there is no Evalution.txt, or no turn can be used.
    """
    found = [p for p in media_files.files(root, ".txt") if p.name in _RATINGS]
    if not found:
        raise AvjaxError(f"{root}: no {_RATINGS[0]}; set --config.data.root to the folder of the download")
    ratings, films, sounds = _ratings(found[0]), _by_code(root, ".avi", ".mp4"), _by_code(root, ".wav")
    clips, reasons = [], {}
    for code in dict.fromkeys((*ratings, *films)):
        match, clip_id = re.fullmatch(_CODE, code), f"MSP-IMPROV-{code}"
        label, reasons[clip_id] = _label(ratings.get(code))
        clip = Clip(
            id=clip_id,
            path=films.get(code, root / f"{clip_id}.avi"),
            label=label,
            audio=sounds.get(code),
            speaker=match[2] + match[3],
            gender={"F": "female", "M": "male"}[match[2]],
            fold=str(int(match[3])),
        )
        clips.append(clip)
    return make_corpus("msp_improv", clips, reasons, f"{found[0]}: rates no film, and there is none", "regression")


def _by_code(root: Path, *suffixes: str) -> dict[str, Path]:
    """Of several files of one turn, the first in the order of paths."""
    return {m[1]: p for p in reversed(media_files.files(root, *suffixes)) if (m := _NAME.fullmatch(p.stem))}


def _ratings(path: Path) -> dict[str, str]:
    """Turn → what follows its name, such as ` N; A:2.4; V:2.6; D:3.0;`. Lines of single raters are passed over."""
    lines = path.read_bytes().decode("latin-1").split("\n")
    return {m[1]: m[4] for line in lines if (m := _LINE.fullmatch(line.strip()))}


def _label(rated: str | None) -> tuple[tuple[float, ...], str]:
    """Valence, arousal and dominance from 0 to 1, and why they are none ("" if they are)."""
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
