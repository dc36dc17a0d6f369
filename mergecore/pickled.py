"""Weights that torch.save wrote (pytorch_model.bin) -> names, dtypes, shapes and places on disk of the tensors.

torch reads the structure with `weights_only`, which refuses every Python object but tensors and containers, and
under FakeTensorMode, which reads no tensor data: a storage then knows only where in the file it lies.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergecore.checkpoint import TensorInfo, WeightFile, opened
from mergecore.errors import CheckpointError

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.complex64: "C64",
}  # fmt: skip
_ALIGNMENTS = {b"%d" % (1 << bit) for bit in range(31)}
_CONVERT = "load it where you trust it and save it again as safetensors"


def read_pickled(path: Path) -> WeightFile:
    """The tensors of a state dict in the zip format of torch.save (torch >= 1.6).

    Tensors may share memory (tied weights have the same place). CheckpointError for anything but a dict of names
    and plain, contiguous tensors, for a file that is cut short or compressed, and for a pickle that asks for
    any other Python object; nothing that such a pickle holds is run.
    """
    with opened(path) as fd, os.fdopen(os.dup(fd), "rb") as file:
        status = os.fstat(fd)
        records, header = _records(path, file)
        tensors = [_tensor(path, name, value, records) for name, value in _state_dict(path, file).items()]
    return WeightFile(path, status.st_size, status.st_mtime_ns, xxhash.xxh3_128_hexdigest(header), tuple(tensors))


def _records(path: Path, file: BinaryIO) -> tuple[dict[int, int], bytes]:
    """Where in the file the zip's members lie (offset -> bytes), and what identifies the layout."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(f"{path}: {packed[0]} is compressed and cannot be mapped; {_CONVERT}")
            by_end = {member.filename.rpartition("/")[2]: member for member in members}
            byteorder = archive.read(by_end["byteorder"]) if "byteorder" in by_end else b"little"
            if byteorder != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine; {_CONVERT}")
            for member in members:  # torch divides by it, and dies of a zero
                if member.filename.endswith(".storage_alignment") and archive.read(member) not in _ALIGNMENTS:
                    raise CheckpointError(f"{path}: the alignment of its storages is no power of two: it is damaged")
            if "data.pkl" not in by_end or "constants.pkl" in by_end:
                raise CheckpointError(f"{path} is a zip file, but not a state dict that torch.save wrote; {_CONVERT}")
            listing = [(member.filename, member.header_offset, member.file_size, member.CRC) for member in members]
            header = repr(listing).encode() + archive.read(by_end["data.pkl"])
        records = {_data_offset(file, member.header_offset): member.file_size for member in members}
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged directory can provoke any
        file.seek(0)
        if file.read(2) == b"PK":
            problem = f"is an incomplete or damaged zip file ({error}); copy or download it again"
        else:
            problem = f"is not in the zip format that torch.save has written since torch 1.6; {_CONVERT}"
        raise CheckpointError(f"{path} {problem}") from None
    return records, header


def _data_offset(file: BinaryIO, header_offset: int) -> int:
    """Where a member's bytes begin: after its local header of 30 bytes, name and extra field."""
    file.seek(header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("a member has no header")
    return header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _state_dict(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    file.seek(0)
    try:
        with FakeTensorMode():
            value = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a hostile pickle can provoke any
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} holds more than plain tensors, or is damaged, and is not read: {type(error).__name__}: {reason}. "
            f"If you trust it, {_CONVERT.removeprefix('load it where you trust it and ')}"
        ) from None
    if not isinstance(value, dict) or not value:
        found = "an empty dict" if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{path} holds no state dict (names and tensors) but {found}; {_CONVERT}")
    for name, inner in value.items():
        if isinstance(inner, dict):
            raise CheckpointError(
                f"{path} is a training checkpoint: {name!r} holds a dict, where tensors were expected; "
                "save the state dict of the model alone"
            )
        if not isinstance(name, str) or not isinstance(inner, Tensor):
            raise CheckpointError(f"{path}: {name!r} holds {type(inner).__name__} and no tensor; {_CONVERT}")
    return value


def _tensor(path: Path, name: str, tensor: Tensor, records: dict[int, int]) -> TensorInfo:
    def refused(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name} {what}; {_CONVERT}")

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise refused("is sparse, quantised or a lazy view")
    if tensor.dtype not in _DTYPES:
        raise refused(f"has dtype {tensor.dtype}, which this version does not know")
    if not tensor.is_contiguous():
        raise refused("is not contiguous (it was saved as a view of another)")
    offset: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset not in records:
        raise refused("has no place in the file")
    start, nbytes = tensor.storage_offset() * tensor.element_size(), tensor.numel() * tensor.element_size()
    if start + nbytes > records[offset]:
        raise refused("reaches beyond its storage: the file is damaged")
    return TensorInfo(name, _DTYPES[tensor.dtype], tuple(tensor.shape), path, offset + start, nbytes)
