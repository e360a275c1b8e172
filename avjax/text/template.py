"""The emotion-aware sentence of ETG-AVER (Eq. 2) and its text sources (Table VI), put together from a clip's parts.

A part that is missing leaves no trace. The sentence is meant to be read and edited by people, so parts are cleaned of
what would break a line, close a quotation early or end a sentence twice.
"""

import re
from dataclasses import dataclass, fields

from avjax.errors import choose

# The query of the "w/o ETG" ablation (Fig. 3a): one sentence for every clip.
CONSTANT = "A person is speaking."


@dataclass(frozen=True)
class Parts:
    """The parts of a sentence; None where unknown.

    Attributes:
      scene: what the picture shows, `[D_env]`, such as "a woman sitting at a table".
      face: the facial expression, `[D_AUs]`, such as "raised cheeks and parted lips".
      transcript: what is said, in English, `[T_audio]`.
      rate, pitch, stress: one word each, `[R]`, `[P]`, `[S]`.
    """

    scene: str | None = None
    face: str | None = None
    transcript: str | None = None
    rate: str | None = None
    pitch: str | None = None
    stress: str | None = None


# Table VI: what each text source may say.
_ALLOWED = {
    "both": tuple(field.name for field in fields(Parts)),
    "audio": ("transcript", "rate", "pitch", "stress"),
    "video": ("scene", "face"),
}
SOURCES = tuple(_ALLOWED)


def sentence(parts: Parts, source: str = "both") -> str:
    """The emotion-aware sentence of one clip.

    Complete parts give the paper's template to the letter, capital "The pitch" included:
    `[D_env]. Their facial expressions reveal [D_AUs]. The translated speech says '[T_audio]'. The speech rate is [R],
    The pitch is [P], and the stress is [S].`

    Args:
      parts: of the clip; a part without a single letter or digit counts as missing.
      source: one of `SOURCES`; "audio" leaves out scene and face, "video" leaves out transcript and prosody.

    Returns:
      One line, or "" when nothing is known: the clip's text is then to be masked.

    Raises:
      AvjaxError: `source` is unknown.
    """
    choose("text source", source, SOURCES)
    known = {name: text for name in _ALLOWED[source] if (text := _clean(name, getattr(parts, name)))}
    clauses = (
        f"{known['scene']}." if "scene" in known else "",
        f"Their facial expressions reveal {known['face']}." if "face" in known else "",
        f"The translated speech says '{known['transcript']}'." if "transcript" in known else "",
        _voice(known),
    )
    return " ".join(filter(None, clauses))


def _voice(known: dict[str, str]) -> str:
    names = {"rate": "speech rate", "pitch": "pitch", "stress": "stress"}
    said = [f"{name} is {known[part]}" for part, name in names.items() if part in known]
    if len(said) == 3:
        return f"The {said[0]}, The {said[1]}, and the {said[2]}."
    return f"The {', and the '.join(said)}." if said else ""


# Typographic quotes, and the same as C1 control characters: what Windows-1252 text becomes when read as Latin-1.
_PLAIN = str.maketrans({**dict.fromkeys("‘’\x91\x92", "'"), **dict.fromkeys("“”\x93\x94", '"'), "\x85": "…"})
_SINGLE_QUOTED = re.compile(r"(?<!\w)'(?=\S)(.*?)(?<=\S)'(?!\w)")


def _clean(name: str, text: str | None) -> str:
    """One line without control characters, doubled blanks, repeated full stops or a full stop at its end."""
    text = (text or "").translate(_PLAIN)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = re.sub(r"\.{2,}", "…", text)
    if name == "transcript":
        # Quoted words take the other kind of quotes, apostrophes stay.
        text = _SINGLE_QUOTED.sub(r'"\1"', text)
    # "!", "?" and "…" tell how something was said, but not what is seen.
    text = text.rstrip(" ." if name == "transcript" else " .,;:!?…")
    return text if any(map(str.isalnum, text)) else ""
