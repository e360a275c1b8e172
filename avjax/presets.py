"""What is extracted of a clip: which measurements, which pretrained encoders. One registry, name → preset."""

import dataclasses

from avjax.errors import AvjaxError


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A pretrained encoder and what is kept of it.

    Attributes:
      source, tower, layer, pool: see `encoders.load`.
      every: of the frames, each so many-th is encoded.
      sees: "face", a square about it in those frames that show one, or "frame", every frame whole.
      side: of a square, and the shorter one of a frame, in pixels; the encoder's own preprocessing goes on from there.
      per_second: steps of sound are averaged to so many a second; 0 = as the encoder gives them.
    """

    source: str
    tower: str | None = None
    layer: int | None = None
    pool: str | None = None
    every: int = 1
    sees: str = "face"
    side: int = 256
    per_second: int = 0


@dataclasses.dataclass(frozen=True)
class Flow:
    """Optical flow of the face, drawn and encoded: the stream `flow`, beside `video`.

    Both frames of a pair are cut at the face's square in the second, so that no flow comes from squares that jump.

    Attributes:
      source: "dis", or an encoder of flow.
      image: encoder of the drawn flow.
      window, stride: the flow is that from `window` frames before to each `stride`-th frame, and held until the next.
      side: of the squares, in pixels.
    """

    source: str
    image: Encoding
    window: int = 1
    stride: int = 1
    side: int = 224


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is extracted.

    Attributes:
      frames: at most so many evenly spaced video frames; 0 = every frame of the first `max_seconds`.
      steps_per_second: steps of the acoustic measurements; max_seconds: longer sound is cut there.
      image: encoder of the frames, the stream `video`; None = the face measurements alone.
      face: whether face measurements (blendshapes, action units, pose) stand beside the image encoder's features.
      flow: optical flow, the stream `flow`; None = no such stream. It takes every frame.
      sound: encoder of the sound, the stream `audio`; None = acoustic measurements.
      text: encoder of the sentences; max_tokens: longer ones are cut.
      random: whether all encoders get weights drawn at random (`encoders.load`).
    """

    frames: int = 16
    steps_per_second: int = 10
    max_seconds: float = 60.0
    image: Encoding | None = None
    face: bool = True
    flow: Flow | None = None
    sound: Encoding | None = None
    text: Encoding = Encoding("minilm")
    max_tokens: int = 128
    random: bool = False


# DE-III's eyes: face expressions, in pictures of faces and in flow drawn as pictures alike.
_B2 = Encoding("hsemotion_b2", pool="mean", side=224)
_DEIII = Preset(
    frames=0,
    image=_B2,
    face=False,
    flow=Flow("perceiver_flow", _B2, side=368),
    sound=Encoding("wav2vec2_large_robust"),
)
PRESETS = {
    # Blendshapes, action units and head pose; `audio.acoustic`; MiniLM's tokens.
    "lite": Preset(),
    # Encoders that can be had without the hub. Layers chosen on held-out training speakers (README): Whisper's middle
    # is .13 above its end; for the picture layers 9 to 12 are alike, the tenth spares two, and half the frames do.
    "open": Preset(
        image=Encoding("vit_s14", layer=10, pool="first", every=2),
        sound=Encoding("whisper_base", layer=3, per_second=10),
    ),
    # The papers' (specification of the systems: section 1, "Features"; section 2; section 4).
    "etg": Preset(
        frames=8,
        image=Encoding("vit_b16", pool="first"),
        face=False,
        sound=Encoding("data2vec_audio"),
        text=Encoding("distilbert"),
    ),
    "deiii": _DEIII,
    # The same with the flow that a laptop can bear.
    "deiii_dis": dataclasses.replace(_DEIII, flow=Flow("dis", _B2)),
    "emoasst": Preset(
        frames=24,
        image=Encoding("clip_vit_b32", tower="vision", pool="projected", sees="frame", side=224),
        face=False,
        sound=Encoding("wav2vec2_segue", layer=9),
        text=Encoding("clip_vit_b32", tower="text", pool="projected"),
        max_tokens=77,
    ),
}


def preset(name: str, *, random: bool = False) -> Preset:
    """Looks a preset up; `random` asks for encoders with weights drawn at random.

    Raises:
      AvjaxError: no preset has that name.
    """
    if name not in PRESETS:
        raise AvjaxError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], random=random)


def encodings(settings: Preset) -> dict[str, Encoding]:
    """The encoders of picture, flow and sound that a preset has: feature → encoder."""
    flow_image = settings.flow.image if settings.flow else None
    three = {"image": settings.image, "flow": flow_image, "sound": settings.sound}
    return {feature: encoding for feature, encoding in three.items() if encoding}


def every(settings: Preset) -> int:
    """Of the measured frames each so many-th is a step of the stream `video`."""
    return settings.image.every if settings.image else 1
