"""Settings of data, protocol, optimizer and devices."""

import dataclasses
import math

from avjax.errors import AvjaxError
from avjax.settings.part import Part, check_patterns, setting

_MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class RootSettings(Part):
    """Location of the data set."""

    prefix = "data."
    root: str = setting("", "folder of the data set as downloaded; empty: $AVJAX_DATA/<data set>")


@dataclasses.dataclass(frozen=True)
class DataSettings(RootSettings):
    """Location of data and features."""

    features: str = setting(
        "", "feature store; empty: $AVJAX_CACHE/features/<data set>, or <workdir>/features for a folder data set"
    )
    mode: str = setting(
        "auto",
        "keep features on the device, stream them from disk in batches, or decide by their size",
        choices=("auto", "resident", "streamed"),
    )


@dataclasses.dataclass(frozen=True)
class WeightSettings(Part):
    """Settings of encoder weights."""

    prefix = "weights."
    random: bool = setting(False, "use random encoder weights; all results of such a run are marked")


@dataclasses.dataclass(frozen=True)
class ProtocolSettings(Part):
    """Settings of folds, standardisation and selection."""

    prefix = "protocol."
    folds: str = setting("auto", "how folds are made", choices=("auto", "given", "speaker", "stratified"))
    fold_count: int = setting(5, "number of folds of stratified, and of speaker if there are more speakers", least=2)
    only: str = setting("", "name of the only fold to run; empty: all")
    allow_speaker_overlap: bool = setting(
        False,
        "allow folds made by avjax to have a speaker in both training and test; all results are then marked",
    )
    standardise: str = setting(
        "train",
        "clips whose statistics standardise the features",
        choices=("train", "speaker", "enrol", "none"),
    )
    enrol_clips: int = setting(16, "clips of each speaker for the statistics of enrol; not scored", least=1)
    validation: float = setting(
        0.1, "fraction of the training clips (training speakers, if known) held out; 0: none", least=0, below=1
    )
    select: str = setting("val", "selected epoch: best on validation, or last", choices=("val", "last"))


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Part):
    """Settings of frame augmentation in training, drawn once for all frames of a clip."""

    prefix = "train.augment."
    degrees: float = setting(10.0, "largest angle of rotation", least=0, most=180)
    flip: float = setting(0.5, "probability of mirroring", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class TrainSettings(Part):
    """Seeds, epochs and optimizer."""

    prefix = "train."
    seeds: tuple[int, ...] = setting((42,), "one run for each fold and seed", least=0, most=_MOST_SEED)
    epochs: int = setting(25, "maximum number of epochs", least=1)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "adam", "sgd"))
    batch_size: int = setting(8, "clips in a batch", least=1)
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    rates: tuple[tuple[str, float], ...] = setting(
        (), "pairs of a pattern of parameter paths and a factor of the learning rate; the first match applies"
    )
    layer_decay: float = setting(
        1.0, "factor of the learning rate from each encoder block to the next lower; 1: none", above=0, most=1
    )
    accumulate: int = setting(1, "micro-batches of a batch, to save memory; one update for all of them", least=1)
    weight_decay: float = setting(1e-2, "weight decay", least=0)
    warmup: float = setting(0.05, "fraction of all steps in which the learning rate rises", least=0, most=1)
    schedule: str = setting("cosine", "schedule of the learning rate after warmup", choices=("cosine", "constant"))
    clip_norm: float = setting(1.0, "largest norm of the gradients; 0: no clipping", least=0)
    patience: int = setting(10, "epochs without a better validation score before a run stops; 0: never", least=0)
    save_steps: int = setting(200, "steps between checkpoints within an epoch of streamed data; 0: none", least=0)
    epochs_per_call: int = setting(5, "epochs of one compiled call; checkpoints are written between calls", least=1)
    remat: bool = setting(False, "recompute activations for gradients to save memory")
    augment: AugmentSettings | None = setting(None, "frame augmentation in training")

    def check_together(self) -> None:
        """Checks that seeds differ, and that patterns and factors are usable."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise AvjaxError(f"train.seeds is {self.seeds}; expected one or more, each once")
        check_patterns([pattern for pattern, _ in self.rates], "train.rates")
        if bad := [factor for _, factor in self.rates if not (math.isfinite(factor) and factor >= 0)]:
            raise AvjaxError(f"train.rates has the factor {bad[0]!r}; expected a number of at least 0")


@dataclasses.dataclass(frozen=True)
class MeshSettings(Part):
    """Distribution over devices; a run may be resumed with another mesh."""

    prefix = "mesh."
    preset: str = setting(
        "auto",
        "auto: lanes, or dp if there is one lane",
        choices=("auto", "single", "dp", "fsdp", "tp", "lanes"),
    )
    lane: int = setting(0, "devices over which lanes are split; 0: by the preset", least=0)
    data: int = setting(0, "devices over which the clips of a batch are split; 0: by the preset", least=0)
    fsdp: int = setting(
        0, "devices over which clips, and parameters between steps, are split; 0: by the preset", least=0
    )
    tensor: int = setting(0, "devices over which heads and hidden units are split; 0: by the preset", least=0)


@dataclasses.dataclass(frozen=True)
class ProcessSettings(Part):
    """Timeouts of several processes."""

    prefix = "processes."
    wait: int = setting(300, "seconds for all processes to join", least=1)
    patience: int = setting(300, "seconds after which a silent process is considered dead", least=1)


@dataclasses.dataclass(frozen=True)
class PromptSettings(Part):
    """Prompts that name the label, for EmoAsst."""

    prefix = "prompts."
    preset: str = setting("", "preset whose text encoder encodes the prompts; empty: that of the features")
