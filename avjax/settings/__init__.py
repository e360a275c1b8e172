"""Typed settings of an experiment, made once from its configuration and fully checked before any data are read.

Experiments are `ml_collections` files (`avjax.config`). `Settings.of` converts one to frozen dataclasses; no function
below the commands takes a configuration. Each field declares its default and its meaning, which `--keys` prints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from avjax.errors import AvjaxError
from avjax.settings.model import (
    STREAMS,
    EncoderSettings,
    EtgAverSettings,
    FusionSettings,
    LoraSettings,
    check_model_settings,
)
from avjax.settings.part import Part, mapping, setting
from avjax.settings.training import (
    AugmentSettings,
    DataSettings,
    MeshSettings,
    ProcessSettings,
    PromptSettings,
    ProtocolSettings,
    RootSettings,
    TrainSettings,
    WeightSettings,
)


@dataclasses.dataclass(frozen=True)
class ExtractSettings(Part):
    """Settings of `avjax.extract`."""

    command: ClassVar[str] = "extract"
    example: ClassVar[str] = "configs/extract_folder.py"
    name: str = setting("", "name of the experiment")
    variants: str = setting("", "variants of the configuration, as given after the colon")
    dataset: str = setting("folder", "name in the registry of data sets, optionally with :target")
    preset: str = setting("lite", "features to extract")
    weights: WeightSettings = setting(WeightSettings, "weights of encoders")
    data: RootSettings = setting(RootSettings, "location of the data")
    workers: int = setting(0, "worker processes; 0: one for each core", least=0)
    clip_seconds: float = setting(120.0, "seconds that one clip may take; slower clips are quarantined", above=0)


@dataclasses.dataclass(frozen=True)
class Settings(Part):
    """Settings of `avjax.train`: a complete experiment."""

    command: ClassVar[str] = "train"
    example: ClassVar[str] = "configs/etg_folder.py"
    name: str = setting("", "name of the experiment")
    variants: str = setting("", "variants of the configuration, as given after the colon")
    dataset: str = setting("folder", "name in the registry of data sets, optionally with :target")
    preset: str = setting("lite", "features that the model reads")
    weights: WeightSettings = setting(WeightSettings, "weights of encoders")
    data: DataSettings = setting(DataSettings, "location of data and features")
    model: EtgAverSettings | FusionSettings = setting(EtgAverSettings, "model")
    protocol: ProtocolSettings = setting(ProtocolSettings, "folds, statistics and selection")
    train: TrainSettings = setting(TrainSettings, "seeds, epochs and optimizer")
    mesh: MeshSettings = setting(MeshSettings, "devices")
    processes: ProcessSettings = setting(ProcessSettings, "processes")
    prompts: PromptSettings | None = setting(None, "prompts that name the label")
    tables: Mapping[str, Any] | None = setting(None, "features measured by others (`avjax.features.tables`)")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Makes the settings from plain values; raises as `Part.of`."""
        return super().of({**plain, "model": _model(plain.get("model", {}))})

    def check_together(self) -> None:
        """Checks that the features include the text that the model reads."""
        source = self.model.text_source if "text" in self.model.streams else ""
        if source == "given" and self.tables is None:
            raise AvjaxError("model.text_source is 'given', the text of tables, but this configuration has no tables")
        if source == "utterance" and self.prompts is None:
            raise AvjaxError("model.text_source is 'utterance', which requires a configuration with prompts")


def _model(plain: Any) -> EtgAverSettings | FusionSettings:
    plain = mapping("model", plain)
    return (FusionSettings if "settings" in plain else EtgAverSettings).of(plain)


def of_config(plain: Mapping[str, Any]) -> Settings | ExtractSettings:
    """Makes the settings of a configuration in plain values, for either command.

    Raises:
      AvjaxError: a key is unknown, or a value does not fit.
    """
    return (Settings if "train" in plain else ExtractSettings).of(plain)
