"""Reasons why files cannot be read, and files below a folder."""

import os

import pytest

from avjax.utils import media_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POINTER, "a Git LFS pointer, not the file: fetch it with git lfs pull"),
        (POINTER.replace(b"v1", b"v2"), "a Git LFS pointer, not the file: fetch it with git lfs pull"),
        (POINTER + b"x" * 1000, ""),
        (b"\n" + POINTER, ""),
        (POINTER[:20], ""),
        (b"", "an empty file"),
    ],
)
def test_pointers_of_git_lfs(tmp_path, content, reason):
    assert media_files.trouble(write(tmp_path / "film.mp4", content)) == reason


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "film.mp4")
    assert media_files.trouble(tmp_path / "film.mp4") == "not a file but a pipe, a socket or a device"


def test_files_below_a_folder(tmp_path):
    for name in ("b/2.MP4", "b/1.mp4", "a.mp4", "a.avi", "a.mp4.part", "._a.mp4", "b/.hidden.mp4", ".b/3.mp4"):
        write(tmp_path / name)
    assert media_files.files(tmp_path, ".mp4") == [tmp_path / name for name in ("a.mp4", "b/1.mp4", "b/2.MP4")]
    assert media_files.files(tmp_path, ".avi", ".mp4")[0] == tmp_path / "a.avi"
    assert media_files.files(tmp_path / "nowhere", ".mp4") == []
