"""The emotion-aware sentence of ETG-AVER (Eq. 2) and its text sources (Table VI), composed of a clip's parts.

A missing part leaves no trace. People read and edit the sentence, so parts are cleaned of characters that would break a
line, close a quotation early or end a sentence twice.
"""

import re
from dataclasses import dataclass, fields

from avjax.errors import choose

# The query of the "w/o ETG" ablation (Fig. 3a): one sentence for every clip.
CONSTANT = "A person is speaking."


@dataclass(frozen=True)
class Parts:
    """The parts of a sentence; None if unknown.

    Attributes:
      scene: description of the scene, `[D_env]`, such as "a woman sitting at a table".
      face: the facial expression, `[D_AUs]`, such as "raised cheeks and parted lips".
      transcript: the transcript in English, `[T_audio]`.
      rate, pitch, stress: one word each, `[R]`, `[P]`, `[S]`.
    """

    scene: str | None = None
    face: str | None = None
    transcript: str | None = None
    rate: str | None = None
    pitch: str | None = None
    stress: str | None = None


# Table VI: the parts of each text source.
_ALLOWED = {
    "both": tuple(field.name for field in fields(Parts)),
    "audio": ("transcript", "rate", "pitch", "stress"),
    "video": ("scene", "face"),
}
SOURCES = tuple(_ALLOWED)


def sentence(parts: Parts, source: str = "both") -> str:
    """Returns the emotion-aware sentence of one clip.

    Complete parts yield exactly the paper's template, including its capital "The pitch":
    `[D_env]. Their facial expressions reveal [D_AUs]. The translated speech says '[T_audio]'. The speech rate is [R],
    The pitch is [P], and the stress is [S].`

    Args:
      parts: of the clip; a part without any letter or digit counts as missing.
      source: one of `SOURCES`; "audio" omits scene and face, "video" omits transcript and prosody.

    Returns:
      One line, or "" if no part is known: the clip's text must then be masked.

    Raises:
      AvjaxError: `source` is unknown.
    """
    choose("text source", source, SOURCES)
    texts = {name: text for name in _ALLOWED[source] if (text := _clean(name, getattr(parts, name)))}
    clauses = (
        f"{texts['scene']}." if "scene" in texts else "",
        f"Their facial expressions reveal {texts['face']}." if "face" in texts else "",
        f"The translated speech says '{texts['transcript']}'." if "transcript" in texts else "",
        _voice(texts),
    )
    return " ".join(filter(None, clauses))


def _voice(texts: dict[str, str]) -> str:
    names = {"rate": "speech rate", "pitch": "pitch", "stress": "stress"}
    clauses = [f"{name} is {texts[part]}" for part, name in names.items() if part in texts]
    if len(clauses) == 3:
        return f"The {clauses[0]}, The {clauses[1]}, and the {clauses[2]}."
    return f"The {', and the '.join(clauses)}." if clauses else ""


# Typographic quotes, and the same as C1 control characters: what Windows-1252 text becomes when read as Latin-1.
_PLAIN = str.maketrans({**dict.fromkeys("‘’\x91\x92", "'"), **dict.fromkeys("“”\x93\x94", '"'), "\x85": "…"})
_SINGLE_QUOTED = re.compile(r"(?<!\w)'(?=\S)(.*?)(?<=\S)'(?!\w)")


def _clean(name: str, text: str | None) -> str:
    """Returns one line without control characters, repeated spaces, repeated full stops or a final full stop."""
    text = (text or "").translate(_PLAIN)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = re.sub(r"\.{2,}", "…", text)
    if name == "transcript":
        # Quoted words get double quotes; apostrophes stay.
        text = _SINGLE_QUOTED.sub(r'"\1"', text)
    # "!", "?" and "…" express how something was said, but not what is seen.
    text = text.rstrip(" ." if name == "transcript" else " .,;:!?…")
    return text if any(map(str.isalnum, text)) else ""
