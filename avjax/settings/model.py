"""Settings of models: fields for ETG-AVER; for fusions and EmoAsst, settings checked against the model's defaults."""

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avjax.errors import AvjaxError, choose
from avjax.settings.part import Part, check_limits, check_patterns, mapping, setting, typed

STREAMS = ("text", "audio", "video")
DTYPES = ("float32", "bfloat16")
TEXT_SOURCES = ("both", "audio", "video", "constant", "utterance", "given")


@dataclasses.dataclass(frozen=True)
class FusionSettings(Part):
    """Settings of a fusion of feature sequences or EmoAsst; `settings` are those of the model itself."""

    prefix = "model."
    name: str = setting("concat", "name in the registry of models")
    streams: tuple[str, ...] = setting(STREAMS, "streams that the model reads")
    text_source: str = setting("both", "source of the text", choices=("", *TEXT_SOURCES))
    dtype: str = setting("float32", "type of activations; parameters are float32", choices=DTYPES)
    settings: Mapping[str, Any] = setting(dict, "settings of the model itself")

    def check_together(self) -> None:
        """Checks that each stream is named once, and that text has a source."""
        check_streams(self.streams, self.text_source)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yields (dotted key, value, meaning) of every field and every setting of the model."""
        yield from (row for row in super().rows() if row[0] != "model.settings")
        for key, value in self.settings.items():
            yield f"model.settings.{key}", value, f"setting of {self.name}"


def check_streams(streams: Sequence[str], text_source: str) -> None:
    """Raises AvjaxError if there is no stream, a stream is named twice, or the text has no source."""
    if not streams or len(set(streams)) < len(streams):
        raise AvjaxError(f"model.streams is {streams}; expected one or more, each once")
    if "text" in streams and not text_source:
        raise AvjaxError(f"model.text_source is empty; for the stream text choose one of {', '.join(TEXT_SOURCES)}")


@dataclasses.dataclass(frozen=True)
class LoraSettings(Part):
    """Settings of low-rank updates of encoder weights (LoRA)."""

    prefix = "model.encoders.lora."
    rank: int = setting(8, "rank of the updates", least=1)
    alpha: float = setting(16.0, "scale of the updates, divided by the rank", above=0)
    targets: tuple[str, ...] = setting(
        (r"/attention/(query|key|value|out)/kernel$",), "patterns of the paths of updated kernels"
    )

    def check_together(self) -> None:
        """Checks the patterns."""
        check_patterns(self.targets, "model.encoders.lora.targets")


@dataclasses.dataclass(frozen=True)
class EncoderSettings(Part):
    """Settings of encoders trained with `etg_aver_raw`."""

    prefix = "model.encoders."
    tune: str = setting("full", "train all weights except frozen ones, or low-rank updates", choices=("full", "lora"))
    frozen: tuple[str, ...] = setting((), "patterns of paths that are not trained, such as ^text/ or /words/")
    lora: LoraSettings = setting(LoraSettings, "low-rank updates")
    remat: bool = setting(True, "recompute blocks for gradients on accelerators to save memory")
    preset: str = setting("lite", "preset of the encoders; follows `preset`")
    random: bool = setting(False, "use random weights; follows `weights.random`")

    def check_together(self) -> None:
        """Checks the patterns."""
        check_patterns(self.frozen, "model.encoders.frozen")


@dataclasses.dataclass(frozen=True)
class EtgAverSettings(Part):
    """Settings of ETG-AVER on features, or on raw input with its encoders (`etg_aver_raw`)."""

    prefix = "model."
    name: str = setting("etg_aver", "name in the registry of models", choices=("etg_aver", "etg_aver_raw"))
    width: int = setting(128, "width of the model; the paper's encoders give 768", least=1)
    streams: tuple[str, ...] = setting(STREAMS, "streams that the model reads", choices=STREAMS)
    text_source: str = setting("both", "source of the text", choices=("", *TEXT_SOURCES))
    guide: bool = setting(True, "let the text weight audio and video (Eqs. 3-4)")
    fusion: str = setting("attention", "fusion (Eq. 5, Table IV)", choices=("concat", "additive", "attention"))
    hlo: bool = setting(True, "add a separate loss for each modality (Eqs. 6-7)")
    loss_weights: tuple[float, float, float, float] = setting(
        (2.0, 2.0, 1.0, 1.0), "weights of the losses of fusion, text, audio and video", least=0
    )
    weighting: str = setting("softmax", "interpretation of Eq. 4", choices=("softmax", "ratio"))
    temperature: float = setting(0.1, "temperature of the softmax of Eq. 4", above=0)
    query: str = setting("tokens", "text features that are the queries of Eq. 5", choices=("tokens", "summary"))
    summary: str = setting("mean", "pooling of tokens to one vector", choices=("first", "mean"))
    segment_count: int = setting(8, "equal time spans over which audio and video are averaged", least=1)
    dropout: float = setting(0.0, "dropout", least=0, below=1)
    imbalance: str = setting(
        "none",
        "treatment of class imbalance",
        choices=("none", "class_weights", "logit_adjustment", "focal"),
    )
    smoothing: float = setting(0.0, "label smoothing", least=0, below=1)
    dtype: str = setting("float32", "type of activations; parameters are float32", choices=DTYPES)
    encoders: EncoderSettings = setting(EncoderSettings, "encoders of etg_aver_raw")

    def check_together(self) -> None:
        """Checks streams against guidance and fusion, and smoothing against the loss."""
        check_streams(self.streams, self.text_source)
        if self.imbalance == "focal" and self.smoothing:
            raise AvjaxError(
                f"model.smoothing is {self.smoothing} with model.imbalance='focal'; the focal loss takes hard labels: "
                "set model.smoothing=0.0, or choose another model.imbalance"
            )
        if (self.guide or self.fusion != "concat") and set(self.streams) != set(STREAMS):
            raise AvjaxError(
                f"model.streams is {self.streams}; text guidance and attention fusion need text, audio and video: "
                "set model.guide=False and model.fusion='concat', or give all three"
            )


# ---- Own settings of a model ----------------------------------------------------------------------------------------
def check_model_settings(
    given: Mapping[str, Any], default: Mapping[str, Any], choices: Mapping[str, Sequence[str]]
) -> None:
    """Checks settings of a model against its defaults: keys, types, choices and sizes.

    Args:
      given: the settings that are given.
      default: all settings with their defaults.
      choices: setting → allowed values, for settings with choices.

    Raises:
      AvjaxError: a setting is unknown or does not fit.
    """
    for name, value in given.items():
        choose("model.settings key", name, default)
        if name in choices:
            choose(f"model.settings.{name}", value, choices[name])
        _check_like(f"model.settings.{name}", value, default[name])
    merged = {**default, **given}
    if merged.get("heads") and isinstance(merged.get("width"), int) and merged["width"] % merged["heads"]:
        raise AvjaxError(f"model.settings.width is {merged['width']}; expected a multiple of heads, {merged['heads']}")


def _check_like(key: str, value: Any, default: Any) -> None:
    """Checks that a value has the type of its default, and its range: integers are counts, a dropout is below 1."""
    if isinstance(default, Mapping):
        for name in mapping(key, value):
            choose(f"{key} key", name, default)
            _check_like(f"{key}.{name}", value[name], default[name])
        if len(value) < len(default):
            raise AvjaxError(f"{key} has {', '.join(value)}; expected {', '.join(default)}")
    elif isinstance(default, tuple):
        for item in typed(key, value, types.GenericAlias(tuple, (type(default[0]), ...))):
            _check_like(key, item, default[0])
        if not value or ("dropout" in key and len(value) != len(default)):  # each width adds a layer
            raise AvjaxError(f"{key} is {value!r}; expected {len(default)} values, such as {default}")
    else:
        value = typed(key, value, type(default))
        check_limits(key, value, {"choices": (), "limits": _limits_like(key, default)})


def _limits_like(key: str, default: Any) -> dict[str, float]:
    if isinstance(default, int):
        return {"least": int(not isinstance(default, bool))}
    if "dropout" in key:
        return {"least": 0, "below": 1}
    return {"above": 0} if "temperature" in key or "rate" in key else {"least": 0}
