"""EmoAsst's emotion prompts: six sentences that name a clip's label, for training only (Wang and Yang 2024, Fig. 3).

Missing parts leave no gap: without a gender the speaker is a "person", without a name "the speaker", without a
transcript the utterance is "something".
"""

from avjax.errors import choose

_PEOPLE = {"female": ("woman", "She is"), "male": ("man", "He is"), None: ("person", "They are")}
FORMATS = (
    "A {label} video.",
    "A {label} {person} is speaking.",
    "The speaker has a {label} face.",
    "{they} saying {quoted} with a {label} emotion.",
    "{speaker} is {label} in this video.",
    "The utterance {utterance}shows the speaker's {label}.",
)
# Those that name only the label: their mean is the weight of a class in the zero-shot classifier (Eq. 2).
OF_CLASSES = (0, 2)


def prompts(
    label: str, utterance: str | None = None, speaker: str | None = None, gender: str | None = None
) -> tuple[str, ...]:
    """Returns the six prompts of a clip, in the order of the figure.

    Args:
      label: name of the emotion.
      utterance: the transcript.
      speaker: name of the speaker.
      gender: "female", "male", or None.

    Raises:
      AvjaxError: the gender is none of these.
    """
    choose("gender", gender, _PEOPLE)
    person, they = _PEOPLE[gender]
    quoted = f"“{utterance}”" if utterance else "something"
    parts = {
        "label": label,
        "person": person,
        "they": they,
        "quoted": quoted,
        "utterance": f"{quoted} " if utterance else "",
        "speaker": speaker or "The speaker",
    }
    return tuple(text.format(**parts) for text in FORMATS)


def of_class(label: str) -> tuple[str, ...]:
    """Returns the prompts that name only a class."""
    return tuple(FORMATS[i].format(label=label) for i in OF_CLASSES)
