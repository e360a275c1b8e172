"""What is extracted of a clip: which measurements, which pretrained encoders. One registry, name → preset."""

import dataclasses

from avjax.errors import choose


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
      image: encoder of the drawn flow; None = its means over the cells of a grid (`flow.grid`).
      window, stride: the flow is that from `window` frames before to each `stride`-th frame, and held until the next.
      side: of the squares, in pixels.
    """

    source: str
    image: Encoding | None
    window: int = 1
    stride: int = 1
    side: int = 224


@dataclasses.dataclass(frozen=True)
class Window:
    """Raw pictures of the face and MFCC of one span in the middle of a clip: the streams `video` and `audio`.

    Attributes:
      seconds: of the span; a shorter clip has all of it, and the steps beyond its end are masked.
      rate, count: the pictures are the middle ones of `count` equal parts of the span, counted in frames of `rate` a
        second: of 3.6 s at 30 a second the 15 frames 3, 10, 17, …, 103.
      side: of the pictures, in pixels.
      sample_rate, mfccs: of the sound, as librosa has them.
      released: as AVT-CA's released preprocessing has it: the channels of pictures in the order blue, green, red; boxes
        that reach past the picture not clamped, which leaves nothing of some; pictures from the beginning of the clip,
        beside sound from its middle; zeros beyond the end that count as real.
    """

    seconds: float = 3.6
    rate: int = 30
    count: int = 15
    side: int = 224
    sample_rate: int = 22050
    mfccs: int = 10
    released: bool = False


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is extracted.

    Attributes:
      frames: at most so many evenly spaced video frames; 0 = every frame of the first `max_seconds`.
      steps_per_second: steps of the acoustic measurements; max_seconds: longer sound is cut there.
      image: encoder of the frames, the stream `video`; None = the face measurements alone.
      face: whether face measurements (blendshapes, action units, pose) stand beside the image encoder's features.
      flow: optical flow, the stream `flow`; None = no such stream. It takes every frame.
      speech: encoder of the audio, the stream `audio`; None = acoustic measurements.
      window: raw pictures and MFCC in the place of `video` and `audio`; None = the measurements and encoders above.
      text: encoder of the sentences; max_tokens: longer ones are cut.
      random: whether all encoders get weights drawn at random (`encoders.load`).
      raw: the encoders' own inputs in the place of their features, so that training can move the encoders, too:
        pictures before they are normalised, prepared sound, token ids. `face`, `flow` and `window` go with features.
    """

    frames: int = 16
    steps_per_second: int = 10
    max_seconds: float = 60.0
    image: Encoding | None = None
    face: bool = True
    flow: Flow | None = None
    speech: Encoding | None = None
    window: Window | None = None
    text: Encoding = Encoding("minilm")
    max_tokens: int = 128
    random: bool = False
    raw: bool = False


# DE-III's eyes: face expressions, in pictures of faces and in flow drawn as pictures alike.
_B2 = Encoding("hsemotion_b2", pool="mean", side=224)
DEIII_WINDOWS = ((3, 1), (5, 1), (7, 1), (3, 3), (5, 5), (7, 7))  # of flow, beside 1/1: Table 4
_DEIII = Preset(
    frames=0,
    image=_B2,
    face=False,
    flow=Flow("perceiver_flow", _B2, side=368),
    speech=Encoding("wav2vec2_large_robust"),
)
# Encoders that can be had without the hub. Layers chosen on held-out training speakers (docs/results.md): Whisper's
# middle is .13 above its end; for the picture layers 9 to 12 are alike, and the tenth spares two.
_S14 = Encoding("vit_s14", layer=10, pool="first")
_WHISPER = Encoding("whisper_base", layer=3, per_second=10)
_ETG = Preset(
    frames=8,
    image=Encoding("vit_b16", pool="first"),
    face=False,
    speech=Encoding("data2vec_audio"),
    text=Encoding("distilbert"),
)
# Of raw sound: a training step holds what every layer of the encoder makes of it.
_RAW_SECONDS = 10.0
PRESETS = {
    # Blendshapes, action units and head pose; `audio.acoustic`; MiniLM's tokens.
    "lite": Preset(),
    # Half the frames do.
    "open": Preset(image=dataclasses.replace(_S14, every=2), speech=_WHISPER),
    # As ETG-AVER, DE-III and EmoAsst are published; `avjax.models` has the papers.
    "etg": _ETG,
    # The same encoders to be trained along with the model.
    "open_raw": Preset(frames=8, max_seconds=_RAW_SECONDS, image=_S14, face=False, speech=_WHISPER, raw=True),
    "etg_raw": dataclasses.replace(_ETG, max_seconds=_RAW_SECONDS, raw=True),
    "deiii": _DEIII,
    # The same with the flow that a laptop can bear.
    "deiii_dis": dataclasses.replace(_DEIII, flow=Flow("dis", _B2)),
    **{
        f"deiii_w{window}s{stride}": dataclasses.replace(
            _DEIII, flow=Flow("perceiver_flow", _B2, window, stride, side=368)
        )
        for window, stride in DEIII_WINDOWS
    },
    "deiii_flow_dinov2": dataclasses.replace(_DEIII, flow=Flow("perceiver_flow", _S14, side=368)),
    # DE-III's streams out of `lite`'s measurements and `open`'s encoders, that at ten steps a second of usual video.
    "deiii_lite": Preset(frames=0, flow=Flow("dis", None)),
    "deiii_open": Preset(
        frames=0,
        image=dataclasses.replace(_S14, every=3),
        flow=Flow("dis", _S14, window=3, stride=3),
        speech=_WHISPER,
    ),
    # AVT-CA's: face pictures and MFCC.
    "avtca": Preset(window=Window()),
    "avtca_112": Preset(window=Window(side=112)),
    "avtca_faulty": Preset(window=Window(released=True)),
    "emoasst": Preset(
        frames=24,
        image=Encoding("clip_vit_b32", tower="vision", pool="projected", sees="frame", side=224),
        face=False,
        speech=Encoding("wav2vec2_segue", layer=9),
        text=Encoding("clip_vit_b32", tower="text", pool="projected"),
        max_tokens=77,
    ),
}


def preset(name: str, *, random: bool = False) -> Preset:
    """Looks a preset up; `random` asks for encoders with weights drawn at random.

    Raises:
      AvjaxError: no preset has that name.
    """
    choose("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], random=random)


def encodings(settings: Preset) -> dict[str, Encoding]:
    """The encoders of picture, flow and sound that a preset has: feature → encoder."""
    flow_image = settings.flow.image if settings.flow else None
    three = {"image": settings.image, "flow": flow_image, "speech": settings.speech}
    return {feature: encoding for feature, encoding in three.items() if encoding}


def every(settings: Preset) -> int:
    """Of the measured frames each so many-th is a step of the stream `video`."""
    return settings.image.every if settings.image else 1
