"""Reading checkpoints: safetensors itself is the oracle of what a valid header is and says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from mergecore.checkpoint import open_checkpoint, read_header
from mergecore.errors import CheckpointError, InputFault


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@contextmanager
def unprivileged() -> Iterator[None]:
    """File permissions do not stop root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def model(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


ONE, TWO = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# ---- headers


def test_a_header_tells_names_dtypes_shapes_and_places(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(4).half(),
        "f32": torch.randn(2, 2, 2),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "some.safetensors"
    save_torch(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    header = read_header(path)
    assert {info.name: (info.dtype, info.shape) for info in header.values()} == {
        "bf16": ("BF16", (3, 5)),
        "f16": ("F16", (4,)),
        "f32": ("F32", (2, 2, 2)),
        "scalar": ("I64", ()),
        "empty": ("F32", (0, 4)),
    }
    for name, info in header.items():
        stored = content[info.offset : info.offset + info.nbytes]
        assert stored == tensors[name].flatten().view(torch.uint8).numpy().tobytes()
        assert info.file == path
    assert [info.offset for info in header.values()] == sorted(info.offset for info in header.values())


def test_many_tensors_are_read_in_file_order(tmp_path: Path) -> None:
    save_file({f"layer.{i}": np.full(i % 5, i, np.int32) for i in range(3000)}, tmp_path / "many.safetensors")
    header = read_header(tmp_path / "many.safetensors")
    assert len(header) == 3000
    assert list(header) == sorted(header, key=lambda name: (header[name].offset, header[name].nbytes > 0))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "header too small"),
        (b"short", "header too small"),
        (struct.pack("<Q", 1 << 62), "header too large"),
        (struct.pack("<Q", 99_999_999), "invalid header length"),
        (framed(b"{"), "invalid JSON"),
        (framed(json.dumps({"a": entry("F32", [2], 0, 8)}).encode(), b"1234"), "not fully covered"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_malformed_file_is_named_with_the_reason(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "/proc/" not in str(error.value)


def test_what_is_no_readable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret.safetensors"
        save_file({"a": ONE}, path)
        path.chmod(0)
        with unprivileged(), pytest.raises(CheckpointError, match="cannot be opened: Permission denied"):
            read_header(path)


# Headers that are nearly right: JSON built with small lies, or valid files with their bytes disturbed.

NAMES = st.one_of(st.sampled_from(["a", "b", "layer.0.weight", "ü", ""]), st.text(max_size=3))
ODD_NAMES = st.sampled_from(["__metadata__", "\ud800", "\0"])
DTYPES = st.sampled_from(
    [
        *("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64", "C64"),
        *("F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    ]
)
NUMBERS = st.one_of(
    st.integers(-1, 9),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -0.0, 1.0, 1e999, float("nan")]),
)
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3) | st.just("BF16"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
BITS |= {"F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}


class Pairs(list[tuple[str, Any]]):
    """A JSON object in which keys may repeat."""


def dump(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(json.dumps(key) + ":" + dump(inner) for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(dump(inner) for inner in value) + "]"
    return json.dumps(value)


@st.composite
def crooked_headers(draw: st.DrawFn) -> bytes:
    """Mostly consistent entries, each with a small chance of one of the known crookednesses."""

    def rarely() -> bool:
        return draw(st.integers(0, 29)) == 17

    entries = Pairs()
    position = 0
    for _ in range(draw(st.integers(0, 4))):
        name, dtype = draw(ODD_NAMES if rarely() else NAMES), draw(DTYPES)
        shape: Any = draw(st.lists(st.integers(0, 4), max_size=3))
        begin: Any = position
        end: Any = begin + int(np.prod(shape)) * BITS.get(dtype, 8) // 8
        position = end
        if rarely():
            dtype = draw(st.sampled_from(["F128", "f32"]))
        if rarely():
            shape = draw(st.lists(NUMBERS, max_size=3))
        if rarely():
            begin = draw(NUMBERS)
        if rarely():
            end = draw(NUMBERS)
        if rarely():
            position += draw(st.integers(-4, 4))
        fields = Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [begin, end])])
        if rarely():
            fields[0] = ("dtype", draw(st.one_of(st.just(Pairs([(dtype, None)])), JUNK)))
        if rarely():
            fields.append((draw(st.sampled_from(["extra", "shape", "dtype", "data_offsets"])), draw(JUNK)))
        if rarely():
            fields.pop(draw(st.integers(0, len(fields) - 1)))
        value: Any = draw(st.permutations(fields).map(Pairs))
        if rarely():
            value = draw(st.one_of(st.just([inner for _, inner in fields]), JUNK))
        entries.append((name, value))
        if rarely():
            entries.append((name, value))
    if draw(st.booleans()):
        metadata = draw(JUNK) if rarely() else draw(st.sampled_from([None, {}, {"format": "pt"}]))
        entries.insert(draw(st.integers(0, len(entries))), ("__metadata__", metadata))
    text = dump(draw(st.permutations(entries).map(Pairs)))
    if rarely():
        text = text.replace(":", draw(st.sampled_from([" : ", ":\n", ",", "::"])), 1)
    header = text.encode("utf-8", "surrogatepass")
    header = (
        draw(st.sampled_from([b"\xef\xbb\xbf", b"\0", b"x"]) if rarely() else st.sampled_from([b"", b" "])) + header
    )
    header += draw(st.sampled_from([b"\0", b"x", b"}"]) if rarely() else st.sampled_from([b"", b"   ", b"\n"]))
    data = bytes(range(256)) * 2
    return framed(header, data[: max(0, position + (draw(st.integers(-3, 3)) if rarely() else 0))])


@st.composite
def disturbed_files(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, cut, inserted or added, or with another header length."""
    header = {"__metadata__": {"format": "pt"}, "w": entry("BF16", [2, 3], 0, 12), "b": entry("F32", [2], 12, 20)}
    content = bytearray(framed(json.dumps(header).encode(), bytes(range(20))))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["change", "flip", "cut", "insert", "delete", "append", "length"])):
            case "change" if content:
                content[at] = draw(st.sampled_from(b'0123456789{}[]",: \\uF\0\xff'))
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=3))
            case "delete":
                del content[at : at + draw(st.integers(1, 3))]
            case "append":
                content += draw(st.binary(min_size=1, max_size=4))
            case "length":
                near = st.integers(max(0, len(content) - 20), len(content) + 20)
                length = draw(st.one_of(near, st.sampled_from([0, 1, 100_000_000, 100_000_001, 2**63, 2**64 - 1])))
                content[:8] = struct.pack("<Q", length)
            case _:
                pass
    return bytes(content)


SMALL = json.dumps({"a": entry("U8", [4], 0, 4)})


@settings(max_examples=1500, deadline=None)
@given(st.one_of(crooked_headers(), disturbed_files()))
@example(framed(b"{}"))
@example(framed(b"  {} "))
@example(framed(b"[]"))
@example(framed(SMALL.replace("[4]", "[2,2]").encode(), b"1234"))
@example(framed(f'{{"a":{json.dumps(entry("U8", [2], 0, 2))},{SMALL[1:]}'.encode(), b"1234"))
@example(framed(b'{"a":["U8",[4],[0,4]]}', b"1234"))
@example(framed(b'{"a":{"dtype":{"U8":null},"shape":[4],"data_offsets":[0,4]}}', b"1234"))
@example(framed(SMALL.replace("[4]", "[-0]").encode(), b"1234"))
@example(framed(SMALL.replace("[4]", "[4.0]").encode(), b"1234"))
@example(framed(SMALL.replace("[4]", '[4],"x":NaN').encode(), b"1234"))
@example(framed(SMALL.replace("[4]", '[4],"x":1e999').encode(), b"1234"))
@example(framed(SMALL.replace("[4]", f'[4],"x":{"9" * 5000}').encode(), b"1234"))
@example(framed(SMALL.replace("[4]", f'[4],"x":{"[" * 5000}{"]" * 5000}').encode(), b"1234"))
@example(framed(SMALL.replace('"a"', '"\\ud83d\\ude00"').encode(), b"1234"))
@example(framed(SMALL.replace('"a"', '"\\ud800"').encode(), b"1234"))
@example(framed(SMALL.replace('"a"', '"a\x01"').encode(), b"1234"))
@example(framed(json.dumps({"a": entry("F4", [3], 0, 1)}).encode(), b"1"))
@example(framed(json.dumps({"a": entry("F6_E2M3", [4], 0, 3), "b": entry("F4", [2], 3, 4)}).encode(), b"1234"))
@example(framed(json.dumps({"a": entry("U8", [2**63, 4, 0], 0, 0)}).encode()))
@example(framed(json.dumps({"a": entry("U8", [0, 2**63, 4], 0, 0)}).encode()))
@example(framed(json.dumps({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}).encode(), b"123"))
@example(framed(json.dumps({"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 3, 4)}).encode(), b"1234"))
@example(framed(json.dumps({"b": entry("U8", [2], 2, 4), "a": entry("U8", [2], 0, 2)}).encode(), b"1234"))
def test_read_header_accepts_and_reads_exactly_what_safetensors_does(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            expected = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(content)}
        except SafetensorError:
            with pytest.raises(SafetensorError), safe_open(path, framework="np"):
                pass
            with pytest.raises(CheckpointError):
                read_header(path)
            return
        header = read_header(path)
        assert {
            name: (info.dtype, info.shape, content[info.offset : info.offset + info.nbytes])
            for name, info in header.items()
        } == expected


# ---- model folders


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", one=ONE, two=TWO)
    (folder / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 4}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "qwen2", "num_hidden_layers": 4}
    assert checkpoint.files == [folder / "model.safetensors"]
    assert set(checkpoint.tensors) == {"one", "two"}
    assert open_checkpoint(str(folder)).tensors == checkpoint.tensors


def test_one_file_by_its_path_takes_the_config_beside_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", one=ONE)
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert (checkpoint.config, checkpoint.folder) == ({}, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(folder / "model.safetensors").config == {"model_type": "llama"}


def test_shards_come_in_the_order_of_file_and_offset(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "m", {B: {"b": TWO}, A: {"z": ONE, "a": ONE}}))
    assert [path.name for path in checkpoint.files] == [A, B]
    places = [(info.file.name, info.offset) for info in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert len(places) == 3


def test_any_safetensors_files_make_a_model_and_stray_adapters_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"one": ONE}, folder / "part-a.safetensors")
    save_file({"two": TWO}, folder / "part-b.safetensors")
    save_file({"lora": TWO}, folder / "adapter_model.safetensors")
    save_file({"hidden": TWO}, folder / ".part-c.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"one", "two"}
    save_file({"one": ONE}, folder / "part-b.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor one is in both part-a\.safetensors and part-b\.safetensors"):
        open_checkpoint(folder)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    save_file({"one": ONE}, blob)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert set(open_checkpoint(tmp_path / "snapshot").tensors) == {"one"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {A: {"a": ONE}, B: {"b": TWO}})
    (folder / B).unlink()
    with pytest.raises(CheckpointError, match=f"{B} missing, of 2 files"):
        open_checkpoint(folder)


def test_an_index_that_disagrees_with_the_headers_is_an_error_that_says_how(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {A: {"a": ONE}, B: {"b": TWO}})
    save_file({"a": ONE, "extra": TWO}, folder / A)
    with pytest.raises(CheckpointError, match=f"{A} holds extra, which .* does not put into it"):
        open_checkpoint(folder)
    save_file({"other": ONE}, folder / A)
    with pytest.raises(CheckpointError, match=f"{A} lacks a, which .* puts into it"):
        open_checkpoint(folder)


def test_a_single_file_beside_an_index_that_does_not_know_it_is_ambiguous(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {A: {"a": ONE}, B: {"b": TWO}})
    save_file({"a": TWO}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove one"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {\n"a" 1}}', r"index\.json:2: not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "weight_map is missing or empty"),
        ('{"weight_map": []}', "weight_map is missing or empty"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "not a file name"),
        ('{"weight_map": {"a": 1}}', "not a file name"),
    ],
)
def test_a_malformed_index_is_an_error(tmp_path: Path, index: str, says: str) -> None:
    folder = sharded(tmp_path / "m", {A: {"a": ONE}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b'{"a": 1,\n "b": }', r"config\.json:2: not valid JSON"),
        (b"[1]", "must be a JSON object, found list"),
        (b"\xff\xfe\xfa", r"config\.json: not valid JSON"),
        (b"[" * 100_000, r"config\.json: not valid JSON"),
    ],
)
def test_a_malformed_config_is_named_with_its_line(tmp_path: Path, config: bytes, says: str) -> None:
    folder = model(tmp_path / "m", one=ONE)
    (folder / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["adapter_model.safetensors", "adapter_config.json"],
            r"holds an adapter .*: MODEL\+",
        ),
        (["consolidated.00.pth", "training_args.bin"], r"holds consolidated\.00\.pth and neither .* convert it first"),
        (["config.json"], "holds no weights"),
        ([], "holds no weights"),
    ],
)
def test_a_folder_without_usable_weights_says_what_to_do(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_or_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="local folders"):
        open_checkpoint("Qwen/Qwen1.5-14B")
    with pytest.raises(CheckpointError, match=f"absent does not exist .*{tmp_path}/absent"):
        open_checkpoint("absent")
    with pytest.raises(CheckpointError, match=r"/no/such/model does not exist$"):
        open_checkpoint("/no/such/model")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_checkpoint("a\0b")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"neither a model folder nor a \.safetensors or \.bin"):
        open_checkpoint(tmp_path / "notes.txt")


# ---- identity


def test_the_fingerprint_changes_with_what_identifies_the_input(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", one=ONE)
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    first = open_checkpoint(folder).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert open_checkpoint(folder).fingerprint() == first
    (folder / "config.json").write_text("{ }")
    assert open_checkpoint(folder).fingerprint() != first
    (folder / "config.json").write_text("{}")
    status = weights.stat()
    save_file({"two": ONE}, weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_checkpoint(folder).fingerprint()
    assert second["files"][0]["bytes"] == first["files"][0]["bytes"]
    assert second["files"][0]["header_xxh3_128"] != first["files"][0]["header_xxh3_128"]


def test_an_input_that_changes_after_opening_is_noticed(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", one=ONE)
    checkpoint = open_checkpoint(folder)
    checkpoint.check_unchanged()
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputFault, match="replaced or modified"):
        checkpoint.check_unchanged()
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputFault, match="replaced or modified"):
        checkpoint.check_unchanged()


def test_reading_checkpoints_needs_no_torch() -> None:
    code = "import sys, mergecore.checkpoint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
