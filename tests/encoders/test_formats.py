"""Tensor files of every format, and files that are inconsistent, truncated or ask for execution."""

import os
import pickle
import re
import struct
import sys
import zipfile

import numpy as np
import pytest

from avjax.encoders import formats
from avjax.errors import AvjaxError


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def refused(path, message):
    with pytest.raises(AvjaxError, match=message) as raised:
        formats.read(path)
    assert str(raised.value).startswith(str(path))


def same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def every_cut_refused(path, message):
    """A file truncated anywhere is refused."""
    content = path.read_bytes()
    for end in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:end])
        refused(path, message)


def test_other_files_are_refused(tmp_path):
    refused(tmp_path / "model.h5", r"\*\.safetensors, \*\.onnx, \*\.bin")
    refused(tmp_path / "model.safetensors", "no such file")
    (tmp_path / "model.bin").write_bytes(b"GGUF and more")
    refused(tmp_path / "model.bin", "neither a file of torch.save nor a model.bin of CTranslate2")


def test_safetensors(tmp_path):
    import safetensors.numpy

    tensors = {"a": numbers(2, 3), "b": np.arange(3), "c": numbers(2, dtype=np.float16)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    same(formats.read(path), tensors)
    every_cut_refused(path, "not a readable safetensors file")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(path, "not a readable safetensors file")


# PyTorch. Descriptions are written by hand in pickle's operations, as torch.save uses them.

ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(kind="FloatStorage", key="0", size=6):
    return group(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(size)) + b"Q"


def tensor(stored=None, offset=0, shape=(2, 3), strides=(3, 1)):
    sizes = [group(*map(number, axis)) for axis in (shape, strides)]
    arguments = group(stored or storage(), number(offset), *sizes, b"\x89", ORDERED)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def saved(folder, description=None, storages=None, **others):
    """A file of torch.save with one tensor w, a member for each of `others`."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}(" + text("w") + (description or tensor()) + b"u.")
        for key, content in ({"0": numbers(6)} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", content if isinstance(content, bytes) else content.tobytes())
        for name, content in others.items():
            file.writestr(f"archive/{name}", content)
    return path


def test_pytorch_tensor_of_any_stride(tmp_path):
    same(formats.read(saved(tmp_path)), {"w": numbers(6).reshape(2, 3)})
    same(formats.read(saved(tmp_path, tensor(shape=(3, 2), strides=(1, 3)))), {"w": numbers(6).reshape(2, 3).T})
    same(formats.read(saved(tmp_path, tensor(offset=1, shape=(2,), strides=(4,)))), {"w": numbers(6)[1::4]})
    same(formats.read(saved(tmp_path, tensor(offset=5, shape=(), strides=()))), {"w": numbers(6)[5]})
    same(formats.read(saved(tmp_path, tensor(offset=6, shape=(0, 9), strides=(9, 1)))), {"w": numbers(0, 9)})


@pytest.mark.parametrize(
    ("kind", "stored", "read"),
    [
        ("HalfStorage", np.float16, np.float16),
        ("LongStorage", np.int64, np.int64),
        ("BFloat16Storage", np.uint16, np.float32),
    ],
)
def test_pytorch_types(tmp_path, kind, stored, read):
    values = np.array([1, -2, 0, 0.5, 3, 1.5], np.float32) if read != np.int64 else np.arange(6) - 2**40
    bits = (values.view(np.uint32) >> 16) if stored == np.uint16 else values
    path = saved(tmp_path, tensor(storage(kind)), {"0": bits.astype(stored)})
    same(formats.read(path), {"w": values.reshape(2, 3).astype(read)})


@pytest.mark.parametrize("protocol", [2, 4])
def test_pytorch_reads_what_torch_save_writes(tmp_path, protocol):
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict()  # with _metadata, an int64 of no axis, and these:
    state["transposed"] = state["0.weight"].T
    state["tied"] = state["0.weight"]
    state["half"] = state["0.weight"].half()[1:, 1]
    torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    same(formats.read(tmp_path / "pytorch_model.bin"), {name: value.numpy() for name, value in state.items()})


def test_old_pytorch_files_say_how_to_convert_them(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "pytorch_model.bin", r"before 1\.6.*torch\.save\(torch\.load")


class Command:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("function", "name"), [(os.system, os.system.__module__ + ".system"), (eval, "eval")])
def test_hostile_pickles_are_refused_by_name_and_not_run(tmp_path, function, name, protocol):
    trace = tmp_path / "ran"
    script = f"touch {trace}" if function is os.system else f"__import__('pathlib').Path({str(trace)!r}).touch()"
    inner = pickle.dumps(Command(function, script), protocol)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", inner)
    refused(path, f"asks for .*{re.escape(name)}.*refused")
    assert not trace.exists()
    pickle.loads(inner)
    assert trace.exists(), "the pickle is not the trap it should be"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (b"(lp0\n", "w: not tensors"),
        (b"\x96" + struct.pack("<Q", 1 << 40), "malformed"),  # a bytearray of 1 TB
        (b"(t" + b"r\xff\xff\xff\xff" + b"0", "4294967295 of the memo.*refused"),  # memo number 4294967295
        (b"\x85" * 3, "a key made of tuples in tuples.*refused"),
        (b")" + b"\x85" * 300_000, "w: not tensors"),  # nested beyond what could be printed or hashed
        (b"}(" + b")" + b"\x85" * 300_000 + b"Nu", "a key made of tuples in tuples.*refused"),
        (b"ctorch\nFloatStorage\n" + group(text("3")) + b"R", "malformed"),  # a call of a storage type
        (b"ccollections\nOrderedDict\n" + group(group()) + b"R", "malformed"),  # a call with contents
        (number(3), "w: not tensors; save the model's state_dict alone"),
        (b"}", "w: not tensors"),
        (b"N" + number(3) + tensor(), "keys are not names"),
        (storage(), "w: not tensors"),
        (tensor(storage("DoubleStorage")), r"torch\.DoubleStorage"),
        (tensor(number(3)), "malformed.*without a storage"),
        (tensor(storage(key="../../0")), r"data/\.\./\.\./0 is not there"),
        (tensor(storage(size=7)), "24 bytes, expected 28"),
        (tensor(storage(size=1 << 70)), "malformed"),
        (tensor(storage(size=1 << 40)), "24 bytes, expected"),
        (tensor(offset=1), "exceed a storage of 6"),
        (tensor(offset=-1), "malformed"),
        (tensor(strides=(-3, 1)), "malformed"),
        (tensor(strides=(3,)), "malformed"),
        (tensor(strides=(1 << 45, 1)), "exceed a storage of 6"),
        (tensor(shape=(1 << 40, 1 << 40), strides=(0, 0)), "exceed a storage of 6"),
        (tensor(shape=(1 << 100, 0), strides=(1, 1)), "malformed"),
        (tensor(shape=(1,) * 99, strides=(1,) * 99), "w: .*dimensions"),
        (tensor(shape=(0, 1 << 47, 1 << 47), strides=(1, 1, 1)), "w: .*"),
    ],
)
def test_lies_of_descriptions_are_refused(tmp_path, description, message):
    refused(saved(tmp_path, description), message)


def test_lies_of_archives_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path)
    every_cut_refused(path, "not a readable file of torch.save|truncated|neither|break")
    path = saved(tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/1", bytes(1 << 20))
    refused(path, "compressed or overlap")
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(numbers(6).tobytes(), numbers(6).tobytes()[::-1]))
    refused(path, "not a readable file of torch.save .*CRC")
    refused(saved(tmp_path, byteorder="big"), "big-endian")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/other", b"")
    refused(path, "without data.pkl")
    monkeypatch.setattr(formats, "_LARGEST_DESCRIPTION", 100)
    refused(saved(tmp_path), "expected 100 at most")


# CTranslate2

WIDTH = 4
KINDS = {np.dtype("f4"): 0, np.dtype("i1"): 1, np.dtype("i2"): 2, np.dtype("f2"): 4}


def whisper_variables():
    """A Whisper of one layer a side, 4 wide, as CTranslate2 names and stacks it."""
    w, rng = WIDTH, np.random.default_rng(0)
    shapes = {
        "encoder/conv1/weight": (w, 5, 3),
        "encoder/conv1/bias": (w,),
        "encoder/conv2/weight": (w, w, 3),
        "encoder/conv2/bias": (w,),
        "encoder/position_encodings/encodings": (6, w),
        "decoder/embeddings/weight": (9, w),
        "decoder/position_encodings/encodings": (3, w),
    }
    for side in ("encoder", "decoder"):
        linears = {"self_attention/linear_0": 3 * w, "self_attention/linear_1": w, "ffn/linear_0": 7, "ffn/linear_1": w}
        if side == "decoder":
            linears |= {"attention/linear_0": w, "attention/linear_1": 2 * w, "attention/linear_2": w}
        for name, out in linears.items():
            shapes[f"{side}/layer_0/{name}/weight"] = (out, 7 if name == "ffn/linear_1" else w)
            shapes[f"{side}/layer_0/{name}/bias"] = (out,)
        norms = ["layer_0/self_attention/", "layer_0/ffn/", "", *(["layer_0/attention/"] if side == "decoder" else [])]
        for norm in norms:
            shapes |= {f"{side}/{norm}layer_norm/{leaf}": (w,) for leaf in ("gamma", "beta")}
    variables = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    for side in ("encoder", "decoder"):
        variables[f"{side}/layer_0/self_attention/linear_0/bias"][w : 2 * w] = 0
    variables["decoder/layer_0/attention/linear_1/bias"][:w] = 0
    settings = {"encoder/num_heads": np.int16(2), "decoder/pre_norm": np.int8(1)}
    return variables | settings | {"decoder/alignment_heads": np.ones((3, 2), np.int16)}


def name_of(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name, value, size=None):
    value = np.asarray(value)
    head = name_of(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    return head + struct.pack("<BI", KINDS[value.dtype], value.nbytes if size is None else size) + value.tobytes()


ALIAS = struct.pack("<I", 1) + name_of("decoder/projection/weight") + name_of("decoder/embeddings/weight")


def packed(folder, variables, version=6, spec="WhisperSpec", count=None, end=ALIAS):
    path = folder / "model.bin"
    count = len(variables) if count is None else count
    head = struct.pack("<I", version) + name_of(spec) + struct.pack("<II", 3, count)
    path.write_bytes(head + b"".join(variable(n, v) for n, v in variables.items()) + end)
    return path


def test_ctranslate2_has_the_hubs_names_and_layout(tmp_path):
    given = whisper_variables()
    got = formats.read(packed(tmp_path, given))
    query, key, value = np.split(given["encoder/layer_0/self_attention/linear_0/weight"], 3)
    crossed = np.split(given["decoder/layer_0/attention/linear_1/weight"], 2)
    some = {
        "model.encoder.layers.0.self_attn.q_proj.weight": query,
        "model.encoder.layers.0.self_attn.k_proj.weight": key,
        "model.encoder.layers.0.self_attn.v_proj.weight": value,
        "model.encoder.layers.0.self_attn.v_proj.bias": given["encoder/layer_0/self_attention/linear_0/bias"][
            2 * WIDTH :
        ],
        "model.encoder.layers.0.final_layer_norm.weight": given["encoder/layer_0/ffn/layer_norm/gamma"],
        "model.encoder.layer_norm.bias": given["encoder/layer_norm/beta"],
        "model.encoder.embed_positions.weight": given["encoder/position_encodings/encodings"],
        "model.decoder.layers.0.encoder_attn.k_proj.weight": crossed[0],
        "model.decoder.layers.0.encoder_attn.v_proj.weight": crossed[1],
        "proj_out.weight": given["decoder/embeddings/weight"],
    }
    same({name: got[name] for name in some}, some)


def test_ctranslate2_has_every_tensor_of_the_original(tmp_path):
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    sizes = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 7, "max_source_positions": 6}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 7, "max_target_positions": 3}
    tokens = {"vocab_size": 9, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.WhisperConfig(d_model=WIDTH, num_mel_bins=5, **sizes, **tokens)
    want = transformers.WhisperForConditionalGeneration(config).state_dict()
    got = formats.read(packed(tmp_path, whisper_variables()))
    assert {n: t.shape for n, t in got.items()} == {n: tuple(t.shape) for n, t in want.items()}


def test_lies_of_ctranslate2_files_are_refused(tmp_path):
    given = whisper_variables()
    every_cut_refused(packed(tmp_path, given), "truncated")
    norm = "encoder/layer_norm/gamma"
    for changes, message in [
        ({"version": 5}, "starts with 5, expected its version 6"),
        ({"spec": "TransformerSpec"}, "called 'TransformerSpec', expected 'WhisperSpec'"),
        ({"count": 2**32 - 1}, "truncated"),
        ({"end": ALIAS + b"\0\0"}, "2 bytes too long"),
        ({"end": struct.pack("<I", 1) + name_of("a") + name_of("b")}, "alias a of b"),
        ({"end": struct.pack("<I", 2**32 - 1)}, "truncated"),
    ]:
        refused(packed(tmp_path, given, **changes), message)
    biased = {"encoder/layer_0/self_attention/linear_0/bias": np.ones(3 * WIDTH, np.float16)}
    for more, message in [
        (biased, "linear_0/bias: the bias of the keys is not zero"),
        ({norm: np.ones(WIDTH, np.int8)}, f"{norm} is quantised"),
        ({"encoder/layer_0/gate/weight": np.ones(3, np.float32)}, "gate/weight is not a known variable"),
        ({"decoder/layer_0/attention/linear_1/bias": np.ones(3, np.float32)}, "does not split into"),
    ]:
        refused(packed(tmp_path, given | more), message)
    for size, message in [(2**32 - 1, "truncated"), (0, r"0 bytes for shape \(4,\)")]:
        path = packed(tmp_path, {}, count=1, end=variable(norm, np.ones(WIDTH, np.float16), size=size) + ALIAS)
        refused(path, message)
    for axis, rest in [(2**32 - 1, 2**32 - 1), (0, 2**32 - 1), (1, 1)]:
        head = name_of(norm) + struct.pack("<B200I", 200, axis, *[rest] * 199)
        path = packed(
            tmp_path, {}, count=1, end=head + struct.pack("<BI", 4, 2 * axis % 4) + bytes(2 * axis % 4) + ALIAS
        )
        refused(path, "bytes for shape")


# ONNX


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx", reason="extra media")


def graph(folder, onnx, initializers, nodes):
    """An ONNX file of `nodes` = (operation, path, inputs)."""
    made = [onnx.helper.make_node(op, inputs, [f"{path}_out"], name=path) for op, path, inputs in nodes]
    given = [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(made, "graph", [], [], given))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_onnx_finds_the_names_of_the_module(tmp_path, onnx):
    given = {
        "vit.norm.bias": numbers(4),
        "onnx::MatMul_7": numbers(4, 6),
        "onnx::MatMul_8": numbers(4, 4),
        "onnx::MatMul_9": numbers(4, 4) + 1,
        "onnx::Concat_1": numbers(1, 1, 4),
        "onnx::Reshape_2": numbers(1, 9, 4) + 1,
        "onnx::Add_3": numbers(4) + 2,
        "onnx::MatMul_10": numbers(2, 4, 4),
    }
    nodes = [
        ("Concat", "/vit/embeddings/Concat_6", ["onnx::Concat_1", "x"]),
        ("Reshape", "/vit/embeddings/Reshape_1", ["onnx::Reshape_2", "x"]),
        ("MatMul", "/vit/layer.0/fc1/MatMul", ["x", "onnx::MatMul_7"]),
        ("MatMul", "/vit/layer.0/fc2/MatMul", ["x", "onnx::MatMul_8"]),
        ("MatMul", "/vit/layer.1/fc2/MatMul", ["x", "onnx::MatMul_8"]),  # exporters store equal weights once
        ("MatMul", "/vit/attention/MatMul_1", ["x", "onnx::MatMul_9"]),  # no linear layer
        ("MatMul", "/vit/heads/MatMul", ["x", "onnx::MatMul_10"]),  # nor this one
        ("Concat", "/embeddings/Concat", ["onnx::Add_3", "x"]),  # nor are these positions
        ("Reshape", "/embeddings/Reshape", ["onnx::MatMul_9", "x"]),
        ("Add", "/vit/Add", ["x", "onnx::Add_3"]),
    ]
    want = {
        "vit.norm.bias": given["vit.norm.bias"],
        "vit.layer.0.fc1.weight": given["onnx::MatMul_7"].T,
        "vit.layer.0.fc2.weight": given["onnx::MatMul_8"].T,
        "vit.layer.1.fc2.weight": given["onnx::MatMul_8"].T,
        "vit.embeddings.position_embeddings": np.concatenate([given["onnx::Concat_1"], given["onnx::Reshape_2"]], 1),
    }
    kept = {name: given[name] for name in ("onnx::MatMul_9", "onnx::MatMul_10", "onnx::Add_3")}
    same(formats.read(graph(tmp_path, onnx, given, nodes)), want | kept)


@pytest.mark.parametrize("prefix", ["onnx::Conv_", ""], ids=["since 2022", "before"])
def test_onnx_counts_convolutions_that_a_norm_was_folded_into(tmp_path, onnx, prefix):
    given = {
        f"{prefix}90": numbers(4, 3, 3, 3),
        f"{prefix}91": numbers(4),
        f"{prefix}7": numbers(2, 4, 1, 1),
        "se.weight": numbers(4, 4, 1, 1),
        "se.bias": numbers(4),
        "onnx::Pad_3": np.zeros(8, np.int64),
    }
    nodes = [
        ("Pad", "Pad_0", ["x", "onnx::Pad_3"]),
        ("Conv", "Conv_1", ["x", f"{prefix}90", f"{prefix}91"]),
        ("Conv", "/se/Conv", ["x", "se.weight", "se.bias"]),
        ("Conv", "/top/Conv", ["x", f"{prefix}7"]),
        ("Conv", "/top/again/Conv", ["x", f"{prefix}7", f"{prefix}91"]),  # exporters store equal weights once
        ("Conv", "/other/Conv", ["x", "computed"]),
        ("Conv", "/broken/Conv", []),
    ]
    want = {
        "folded.0.weight": given[f"{prefix}90"],
        "folded.0.bias": given[f"{prefix}91"],
        "folded.1.weight": given[f"{prefix}7"],
        "folded.2.weight": given[f"{prefix}7"],
        "folded.2.bias": given[f"{prefix}91"],
    }
    kept = {name: given[name] for name in ("se.weight", "se.bias", "onnx::Pad_3")}
    same(formats.read(graph(tmp_path, onnx, given, nodes)), want | kept)


def test_lies_of_onnx_files_are_refused(tmp_path, onnx):
    path = graph(tmp_path, onnx, {"w": numbers(30)}, [])
    content = path.read_bytes()
    start = content.index(numbers(30).tobytes())
    for end in range(0, start + 120, 3):
        path.write_bytes(content[:end])
        refused(path, "not a readable ONNX file|not an ONNX file")
    for change, message in [
        ({"dims": [2**62, 2**62]}, r"w, of type 1 and shape \[4611686018427387904, "),
        ({"dims": [31]}, r"w, of type 1 and shape \[31\]"),
        ({"data_location": onnx.TensorProto.EXTERNAL}, "w lies in another file"),
        ({"data_type": 99}, "w, of type 99"),
    ]:
        model = onnx.load(graph(tmp_path, onnx, {"w": numbers(30)}, []))
        for field, value in change.items():
            if field == "dims":
                model.graph.initializer[0].dims[:] = value
            else:
                setattr(model.graph.initializer[0], field, value)
        path.write_bytes(model.SerializeToString())
        refused(path, message)


def test_onnx_missing_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(tmp_path / "model.onnx", r"pip install onnx, or avjax\[media\]")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_raise_nothing_but_avjax_errors(tmp_path, onnx, seed):
    import safetensors.numpy

    safetensors.numpy.save_file({"w": numbers(2, 3)}, tmp_path / "model.safetensors")
    linear = ("MatMul", "/fc/MatMul", ["x", "onnx::MatMul_3"])
    paths = [saved(tmp_path), packed(tmp_path, whisper_variables()), tmp_path / "model.safetensors"]
    paths.append(graph(tmp_path, onnx, {"w": numbers(5), "onnx::MatMul_3": numbers(2, 3)}, [linear]))
    rng = np.random.default_rng(seed)
    refusals = 0
    for path in paths:
        content = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(content)
            for position in rng.integers(0, len(content), 3):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                formats.read(path)
            except AvjaxError:
                refusals += 1
    assert refusals > 100
