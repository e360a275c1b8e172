"""Presets of extraction: measurements and pretrained encoders. One registry, name → preset."""

import dataclasses

from avjax.errors import choose


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A pretrained encoder and the features that are taken from it.

    Attributes:
      source, tower, layer, pool: see `encoders.load`.
      every: every how many-th frame is encoded.
      sees: "face", a square crop in the frames that show one, or "frame", the full frames.
      side: side of a square crop, or the shorter side of a frame, in pixels, before the encoder's own preprocessing.
      per_second: audio steps are averaged to this rate; 0 = the encoder's own.
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
    """Optical flow of the face, rendered as images and encoded: the stream `flow`, beside `video`.

    Both frames of a pair are cropped at the face's square in the second, so that moving squares cause no flow.

    Attributes:
      source: "dis", or an encoder of flow.
      image: encoder of the rendered flow; None = its means over the cells of a grid (`flow.grid`).
      window, stride: flow is computed from `window` frames before to every `stride`-th frame, and held until the next.
      side: side of the squares, in pixels.
    """

    source: str
    image: Encoding | None
    window: int = 1
    stride: int = 1
    side: int = 224


@dataclasses.dataclass(frozen=True)
class Window:
    """Face crops and MFCCs of one span in the middle of a clip: the streams `video` and `audio`.

    Attributes:
      seconds: length of the span; a shorter clip is used in full, and steps beyond its end are masked.
      rate, count: the crops are from the middle frames of `count` equal parts of the span, counted at `rate` frames per
        second: for 3.6 s at 30 per second the 15 frames 3, 10, 17, …, 103.
      side: side of the crops, in pixels.
      sample_rate, mfccs: of the audio, as in librosa.
      released: reproduces AVT-CA's released preprocessing: channels in the order blue, green, red; boxes that extend
        beyond the image not clamped, so that some crops are empty; crops from the beginning of the clip, but audio from
        its middle; zeros beyond the end that count as real.
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
    """A complete choice of features.

    Attributes:
      frames: number of evenly spaced video frames at most; 0 = every frame of the first `max_seconds`.
      steps_per_second: steps of the acoustic measurements.
      max_seconds: longer audio is truncated.
      image: encoder of the frames, the stream `video`; None = the face measurements alone.
      face: whether face measurements (blendshapes, action units, pose) are appended to the image encoder's features.
      flow: optical flow of every frame, the stream `flow`; None = no such stream.
      speech: encoder of the audio, the stream `audio`; None = acoustic measurements.
      window: face crops and MFCCs as `video` and `audio`; None = the measurements and encoders above.
      text: encoder of the sentences.
      max_tokens: longer sentences are truncated.
      random: whether all encoders get random weights (`encoders.load`).
      raw: whether the encoders' inputs are stored instead of their features, so that the encoders can be trained, too:
        images before normalisation, prepared audio, token ids. Excludes `face`, `flow` and `window`.
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


# DE-III encodes face crops and rendered flow with the same expression model.
_B2 = Encoding("hsemotion_b2", pool="mean", side=224)
DEIII_WINDOWS = ((3, 1), (5, 1), (7, 1), (3, 3), (5, 5), (7, 7))  # of flow, beside 1/1: Table 4
_DEIII = Preset(
    frames=0,
    image=_B2,
    face=False,
    flow=Flow("perceiver_flow", _B2, side=368),
    speech=Encoding("wav2vec2_large_robust"),
)
# Encoders that are available without the hub. Layers chosen on held-out training speakers (docs/results.md): Whisper's
# middle layer is .13 above its last one; image layers 9 to 12 are equal, and the tenth saves two.
_S14 = Encoding("vit_s14", layer=10, pool="first")
_WHISPER = Encoding("whisper_base", layer=3, per_second=10)
_ETG = Preset(
    frames=8,
    image=Encoding("vit_b16", pool="first"),
    face=False,
    speech=Encoding("data2vec_audio"),
    text=Encoding("distilbert"),
)
# Limit of raw audio: a training step holds the activations of every layer of the encoder.
_RAW_SECONDS = 10.0
PRESETS = {
    # Blendshapes, action units and head pose; `audio.acoustic`; MiniLM's tokens.
    "lite": Preset(),
    # Every second frame suffices.
    "open": Preset(image=dataclasses.replace(_S14, every=2), speech=_WHISPER),
    # As ETG-AVER, DE-III and EmoAsst are published; `avjax.models` has the papers.
    "etg": _ETG,
    # The same encoders, for training together with the model.
    "open_raw": Preset(frames=8, max_seconds=_RAW_SECONDS, image=_S14, face=False, speech=_WHISPER, raw=True),
    "etg_raw": dataclasses.replace(_ETG, max_seconds=_RAW_SECONDS, raw=True),
    "deiii": _DEIII,
    # The same with flow that a laptop can compute.
    "deiii_dis": dataclasses.replace(_DEIII, flow=Flow("dis", _B2)),
    **{
        f"deiii_w{window}s{stride}": dataclasses.replace(
            _DEIII, flow=Flow("perceiver_flow", _B2, window, stride, side=368)
        )
        for window, stride in DEIII_WINDOWS
    },
    "deiii_flow_dinov2": dataclasses.replace(_DEIII, flow=Flow("perceiver_flow", _S14, side=368)),
    # DE-III's streams from `lite`'s measurements and from `open`'s encoders, the latter at about ten steps per second.
    "deiii_lite": Preset(frames=0, flow=Flow("dis", None)),
    "deiii_open": Preset(
        frames=0,
        image=dataclasses.replace(_S14, every=3),
        flow=Flow("dis", _S14, window=3, stride=3),
        speech=_WHISPER,
    ),
    # AVT-CA's: face crops and MFCCs.
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
    """Looks up a preset; `random` requests encoders with random weights.

    Raises:
      AvjaxError: no preset has that name.
    """
    choose("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], random=random)


def encodings(settings: Preset) -> dict[str, Encoding]:
    """Returns the encoders of images, flow and audio that a preset has: feature → encoder."""
    flow_image = settings.flow.image if settings.flow else None
    three = {"image": settings.image, "flow": flow_image, "speech": settings.speech}
    return {feature: encoding for feature, encoding in three.items() if encoding}


def every(settings: Preset) -> int:
    """Returns the stride of the measured frames that become steps of the stream `video`."""
    return settings.image.every if settings.image else 1
