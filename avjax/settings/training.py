"""Settings of data, protocol, optimizer and devices."""

import dataclasses
import math

from avjax.errors import AvjaxError
from avjax.settings.part import Part, check_patterns, setting

_MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class RootSettings(Part):
    """Where the data set is."""

    prefix = "data."
    root: str = setting("", "folder of the data set as it was downloaded; empty: $AVJAX_DATA/<data set>")


@dataclasses.dataclass(frozen=True)
class DataSettings(RootSettings):
    """Where data and features are."""

    features: str = setting(
        "", "feature store; empty: $AVJAX_CACHE/features/<data set>, of a folder data set <workdir>/features"
    )
    mode: str = setting(
        "auto",
        "features on the device, from disk batch by batch, or by their size",
        choices=("auto", "resident", "streamed"),
    )


@dataclasses.dataclass(frozen=True)
class WeightSettings(Part):
    """Which weights encoders get."""

    prefix = "weights."
    random: bool = setting(
        False, "draw the weights of encoders at random; every figure of such a run is marked with it"
    )


@dataclasses.dataclass(frozen=True)
class ProtocolSettings(Part):
    """How clips are divided, standardised and chosen by."""

    prefix = "protocol."
    folds: str = setting("auto", "how folds are made", choices=("auto", "given", "speaker", "stratified"))
    fold_count: int = setting(5, "number of folds of stratified, and of speaker where there are more speakers", least=2)
    only: str = setting("", "name of the one fold to run; empty: all")
    allow_speaker_overlap: bool = setting(
        False,
        "allow folds that avjax makes to have a speaker in training and in test; every result is then marked with it",
    )
    standardise: str = setting(
        "train",
        "clips whose statistics standardise the features",
        choices=("train", "speaker", "enrol", "none"),
    )
    enrol_clips: int = setting(16, "clips of each speaker for the statistics of enrol; they are not scored", least=1)
    validation: float = setting(
        0.1, "share of the training clips (of the training speakers where known) held out; 0: none", least=0, below=1
    )
    select: str = setting("val", "epoch that counts: best on validation, or last", choices=("val", "last"))


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Part):
    """How frames are changed in training, by one draw for all frames of a clip."""

    prefix = "train.augment."
    degrees: float = setting(10.0, "largest angle by which frames are turned", least=0, most=180)
    flip: float = setting(0.5, "probability that frames are mirrored", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class TrainSettings(Part):
    """Seeds, epochs and optimizer."""

    prefix = "train."
    seeds: tuple[int, ...] = setting((42,), "a run for each fold and each of these seeds", least=0, most=_MOST_SEED)
    epochs: int = setting(25, "epochs at most", least=1)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "adam", "sgd"))
    batch_size: int = setting(8, "clips of a batch", least=1)
    learning_rate: float = setting(1e-3, "highest learning rate", above=0)
    rates: tuple[tuple[str, float], ...] = setting(
        (), "pairs of a pattern of parameter paths and a factor of the learning rate; the first that matches counts"
    )
    layer_decay: float = setting(
        1.0, "factor of the learning rate from each block of an encoder to the one below it; 1: none", above=0, most=1
    )
    accumulate: int = setting(1, "pieces that a batch is cut into to save memory; the update is that of all", least=1)
    weight_decay: float = setting(1e-2, "weight decay", least=0)
    warmup: float = setting(0.05, "share of all steps in which the learning rate rises", least=0, most=1)
    schedule: str = setting("cosine", "learning rate after that", choices=("cosine", "constant"))
    clip_norm: float = setting(1.0, "largest norm of the gradients; 0: not clipped", least=0)
    patience: int = setting(10, "epochs without a better validation score before a run stops; 0: never", least=0)
    save_steps: int = setting(200, "steps between checkpoints within an epoch of streamed data; 0: none", least=0)
    epochs_per_call: int = setting(5, "epochs of one compiled call; checkpoints are written between calls", least=1)
    remat: bool = setting(False, "compute a batch again for its gradients instead of keeping it: less memory")
    augment: AugmentSettings | None = setting(None, "how frames are changed in training")

    def check_together(self) -> None:
        """Checks that seeds differ, and that patterns and factors are usable."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise AvjaxError(f"train.seeds is {self.seeds}; expected one or more, each once")
        check_patterns([pattern for pattern, _ in self.rates], "train.rates")
        if bad := [factor for _, factor in self.rates if not (math.isfinite(factor) and factor >= 0)]:
            raise AvjaxError(f"train.rates has the factor {bad[0]!r}; expected a number of at least 0")


@dataclasses.dataclass(frozen=True)
class MeshSettings(Part):
    """How devices share the work; a run may go on with another mesh."""

    prefix = "mesh."
    preset: str = setting(
        "auto",
        "auto: lanes, or dp where there is one lane",
        choices=("auto", "single", "dp", "fsdp", "tp", "lanes"),
    )
    lane: int = setting(0, "devices that share the lanes; 0: by the preset", least=0)
    data: int = setting(0, "devices that share the clips of a batch; 0: by the preset", least=0)
    fsdp: int = setting(0, "devices that share clips, and parameters between steps; 0: by the preset", least=0)
    tensor: int = setting(0, "devices that share heads and hidden units; 0: by the preset", least=0)


@dataclasses.dataclass(frozen=True)
class ProcessSettings(Part):
    """How several processes wait for each other."""

    prefix = "processes."
    wait: int = setting(300, "seconds for all processes to join", least=1)
    patience: int = setting(300, "seconds until a silent process is given up", least=1)


@dataclasses.dataclass(frozen=True)
class PromptSettings(Part):
    """Prompts that name the label, for EmoAsst."""

    prefix = "prompts."
    preset: str = setting("", "preset whose text encoder encodes the prompts; empty: that of the features")
