"""What torch.save wrote: torch.load is the oracle of names, dtypes, shapes and values."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mergecore.checkpoint import open_checkpoint
from mergecore.errors import CheckpointError, InputFault
from mergecore.pickled import read_pickled

WEIGHT = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


def saved(folder: Path, value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name, **options)
    return folder / name


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """The same zip with other members; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            new = change(name.rpartition("/")[2], content)
            if new is not None:
                archive.writestr(name, new)
    return path


def without_version(name: str, content: bytes) -> bytes | None:
    """Older torch wrote no .format_version, and pads differently."""
    return None if name == ".format_version" else content


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def check_same(path: Path, state_dict: dict[str, Tensor]) -> None:
    content = path.read_bytes()
    found = {info.name: info for info in read_pickled(path).tensors}
    assert set(found) == set(state_dict)
    for name, tensor in state_dict.items():
        info = found[name]
        assert (info.shape, info.nbytes, info.file) == (tuple(tensor.shape), tensor.nbytes, path)
        assert content[info.offset : info.offset + info.nbytes] == raw(tensor)


# ---- what is read


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_found_in_its_place(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        "a": (3 * WEIGHT).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    path = saved(tmp_path, values)
    check_same(path, values)
    save_file(values, tmp_path / "same.safetensors")
    stored = open_checkpoint(tmp_path / "same.safetensors").tensors
    assert {info.name: info.dtype for info in read_pickled(path).tensors} == {n: i.dtype for n, i in stored.items()}


def test_a_models_own_state_dict_with_parameters_and_views(tmp_path: Path) -> None:
    embedding = torch.nn.Embedding(7, 4)
    head = torch.nn.Linear(4, 7)
    head.weight = embedding.weight
    tied: OrderedDict[str, Tensor] = OrderedDict(embedding=embedding.weight, head=head.weight, rows=WEIGHT[1:3])
    tied["part"] = WEIGHT.view(-1)[3:9]
    path = saved(tmp_path, tied)
    check_same(path, tied)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["embedding"].offset == checkpoint.tensors["head"].offset
    module = torch.nn.Sequential(head, torch.nn.LayerNorm(7)).state_dict()  # has an attribute of its own: _metadata
    check_same(saved(tmp_path, module), module)


def test_files_of_older_torch_are_read(tmp_path: Path) -> None:
    state = {"a": WEIGHT, "b": WEIGHT.half()}
    check_same(rewritten(saved(tmp_path, state), without_version), state)


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    path = saved(tmp_path, {"a": torch.zeros(16 << 20, dtype=torch.uint8)})
    read_pickled(path)  # what torch loads on first use
    before = bytes_read()
    read_pickled(path)
    assert bytes_read() - before < 1 << 20


# ---- what is refused


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": WEIGHT, "b": Hostile(tmp_path / "ran")})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than plain tensors"):
        read_pickled(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"state_dict": {"a": WEIGHT}, "epoch": 3}, "training checkpoint: 'state_dict' holds a dict"),
        ({"module": {"a": WEIGHT}}, "training checkpoint: 'module'"),
        ([WEIGHT], "no state dict .* but list"),
        ({}, "no state dict"),
        (WEIGHT, "no state dict .* but FakeTensor|no state dict .* but Tensor"),
        ({"a": WEIGHT, "epoch": 3}, "'epoch' holds int and no tensor"),
        ({1: WEIGHT}, "1 holds"),
        ({"a": WEIGHT.T}, "tensor a is not contiguous"),
        ({"a": WEIGHT[:, :2]}, "tensor a is not contiguous"),
        ({"a": WEIGHT[:1].expand(3, 5)}, "tensor a is not contiguous"),
        ({"a": WEIGHT.to_sparse()}, "tensor a is sparse"),
        ({"a": torch.complex(WEIGHT, WEIGHT).conj()}, "tensor a is sparse, quantised or a lazy view"),
        ({"a": WEIGHT.to(torch.complex128)}, "tensor a has dtype torch.complex128"),
        ({"a": WEIGHT.to("meta")}, "tensor a has no place in the file"),
        ({"a": torch.nn.Linear(2, 2)}, "holds more than plain tensors"),
    ],
)
def test_what_is_no_plain_state_dict_is_an_error_that_says_so(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_pickled(saved(tmp_path, value))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_a_quantised_tensor_is_refused(tmp_path: Path) -> None:
    value = {"a": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.quint8)}
    with pytest.raises(CheckpointError, match=r"is sparse, quantised|more than plain tensors"):
        read_pickled(saved(tmp_path, value))


def test_files_in_another_format_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": WEIGHT}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"not in the zip format that torch.save has written since torch 1.6"):
        read_pickled(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not in the zip format"):
        read_pickled(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", b"hello")
    with pytest.raises(CheckpointError, match=r"not a state dict that torch.save wrote"):
        read_pickled(path)
    with pytest.raises(CheckpointError, match=r"does not exist"):
        read_pickled(tmp_path / "absent.bin")
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        read_pickled(tmp_path)


def test_compressed_members_cannot_be_mapped(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path, {"a": WEIGHT}), lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"is compressed and cannot be mapped"):
        read_pickled(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path, {"a": WEIGHT}), lambda name, content: b"big" if name == "byteorder" else content)
    with pytest.raises(CheckpointError, match=r"big-endian"):
        read_pickled(path)


def test_a_tensor_may_not_reach_beyond_its_storage(tmp_path: Path) -> None:
    def shortened(name: str, content: bytes) -> bytes | None:
        return content[:-4] if name == "0" else without_version(name, content)

    with pytest.raises(CheckpointError, match=r"tensor a reaches beyond its storage"):
        read_pickled(rewritten(saved(tmp_path, {"a": WEIGHT}), shortened))


@pytest.mark.parametrize("kept", [2, 100, 0.5, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    path = saved(tmp_path, {"a": WEIGHT})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(CheckpointError, match=r"incomplete or damaged zip file"):
        read_pickled(path)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_file_is_refused_or_read_within_its_bounds(damage: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder), {"a": WEIGHT, "b": WEIGHT.half()})
        content = bytearray(path.read_bytes())
        for at, value in damage:
            content[at % len(content)] = value
        path.write_bytes(content)
        try:
            weights = read_pickled(path)
        except CheckpointError:
            return
        assert all(0 <= info.offset <= info.offset + info.nbytes <= len(content) for info in weights.tensors)


# ---- model folders


def test_a_folder_of_pickled_weights_is_a_model(tmp_path: Path) -> None:
    saved(tmp_path, {"a": WEIGHT})
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    checkpoint = open_checkpoint(tmp_path)
    assert (list(checkpoint.tensors), checkpoint.config) == (["a"], {"model_type": "opt"})
    assert open_checkpoint(tmp_path / "pytorch_model.bin").tensors == checkpoint.tensors


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    saved(tmp_path, {"a": WEIGHT})
    save_file({"b": WEIGHT}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["b"]


def test_pickled_shards_follow_their_index(tmp_path: Path) -> None:
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    saved(tmp_path, {"a": WEIGHT}, first)
    saved(tmp_path, {"b": WEIGHT}, second)
    index = {"metadata": {}, "weight_map": {"a": first, "b": second}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert [path.name for path in open_checkpoint(tmp_path).files] == [first, second]
    saved(tmp_path, {"a": WEIGHT, "c": WEIGHT}, first)
    with pytest.raises(CheckpointError, match=r"holds c, which pytorch_model\.bin\.index\.json does not"):
        open_checkpoint(tmp_path)
    saved(tmp_path, {"a": WEIGHT})
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin and also .* remove one"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / second).unlink()
    with pytest.raises(CheckpointError, match=f"{second} missing, of 2 files"):
        open_checkpoint(tmp_path)


def test_the_fingerprint_knows_the_layout_and_the_age(tmp_path: Path) -> None:
    saved(tmp_path, {"a": WEIGHT})
    checkpoint = open_checkpoint(tmp_path)
    first = checkpoint.fingerprint()
    assert first == json.loads(json.dumps(open_checkpoint(tmp_path).fingerprint()))
    saved(tmp_path, {"b": WEIGHT})
    second = open_checkpoint(tmp_path).fingerprint()
    assert second["files"][0]["bytes"] == first["files"][0]["bytes"]
    assert second["files"][0]["header_xxh3_128"] != first["files"][0]["header_xxh3_128"]
    with pytest.raises(InputFault, match=r"replaced or modified"):
        checkpoint.check_unchanged()


def test_values_come_through_the_checkpoint_as_they_were_saved(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": WEIGHT})
    info = open_checkpoint(tmp_path).tensors["a"]
    mapped = np.memmap(path, np.float32, "r", info.offset, info.shape)
    assert np.array_equal(mapped, WEIGHT.numpy())
