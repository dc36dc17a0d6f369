"""What is fuzzed: bytes in, nothing out. Whatever they are, they are accepted or end in the error meant for users.

Not for making the bytes (mutations.py) or for running (__main__.py, tests/test_fuzz.py).
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from mergecore import plan
from mergecore.adapters import adapted, open_adapter
from mergecore.chat_template import folder_template
from mergecore.checkpoint import open_checkpoint
from mergecore.errors import CheckpointError, MergecoreError, SpecError
from mergecore.inputs import Inputs
from mergecore.references import local_folder
from mergecore.spec import load_spec, parse_spec
from mergecore.tokenizer import read_tokenizer, tokenizer_differences
from mergecore.vocabulary import plan_vocabulary
from service.duplicates import forced
from service.errors import ServiceError
from service.resources import read_priority
from tests.models import LLAMA, llama, write_model
from tests.test_service_models import write_adapter
from tests.vocabularies import save, words

SEEDS = Path(__file__).parent / "seeds"


@cache
def folder(name: str) -> Path:
    """A folder of this process for a target, in memory where there is such a disk."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(prefix=f"mergecore-fuzz-{name}-", dir=place))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    write_model(path / "model", llama(layers=1, hidden=8, vocabulary=8), LLAMA)
    save(path / "model", words("one", "two"), eos_token="two")
    write_model(path / "other", llama(layers=1, hidden=8, vocabulary=8), LLAMA)
    save(path / "other", words("two", "three"))
    return path


def spec(data: bytes) -> None:
    """A dropped spec."""
    with suppress(SpecError):
        parse_spec(data)
    with suppress(ServiceError):
        forced(data.decode(errors="replace"))
    path = folder("spec") / "spec.yaml"
    path.write_bytes(data)
    read_priority(path)


def safetensors(data: bytes) -> None:
    """A weight file."""
    path = folder("safetensors") / "file.safetensors"
    path.write_bytes(data)
    with suppress(CheckpointError):
        for tensor in open_checkpoint(path).tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)


def pickled(data: bytes) -> None:
    """A weight file that torch.save wrote, or did not."""
    path = folder("pickled") / "file.bin"
    path.write_bytes(data)
    with suppress(CheckpointError):
        for tensor in open_checkpoint(path).tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)


def index(data: bytes) -> None:
    """The index of shards."""
    path = folder("index") / "model"
    (path / "model.safetensors.index.json").write_bytes(data)
    with suppress(CheckpointError):
        open_checkpoint(path)


def config(data: bytes) -> None:
    """A model's config.json, as far as planning a merge goes."""
    path = folder("config")
    (path / "model" / "config.json").write_bytes(data)
    for base, method in (("model", "task_arithmetic"), ("other", "linear")):
        entries = [{"model": str(path / name), "parameters": {"weight": 0.5}} for name in ("model", "other")]
        base_model = {"base_model": str(path / base)} if method == "task_arithmetic" else {}
        with suppress(MergecoreError):
            json.dumps(plan(load_spec({"merge_method": method, "models": entries, **base_model})).config)


def adapter(data: bytes) -> None:
    """The config of an adapter."""
    path = folder("adapter")
    if not (path / "adapter").exists():
        write_adapter(path / "adapter")
    (path / "adapter" / "adapter_config.json").write_bytes(data)
    inputs = Inputs(local_folder, path)
    with suppress(CheckpointError):
        model = inputs.open(str(path / "model"))
        adapted(model.tensors, open_adapter(path / "adapter"), model.config)


def tokenizer(data: bytes) -> None:
    """tokenizer.json."""
    path = folder("tokenizer")
    (path / "model" / "tokenizer.json").write_bytes(data)
    _vocabulary(path)


def tokenizer_config(data: bytes) -> None:
    """tokenizer_config.json, and the other files of that kind."""
    path = folder("tokenizer-config")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        (path / "model" / name).write_bytes(data)
    _vocabulary(path)
    with suppress(CheckpointError):
        folder_template(path / "model")


def _vocabulary(path: Path) -> None:
    folders = [path / "model", path / "other"]
    with suppress(CheckpointError):
        read_tokenizer(folders[0])
    tokenizer_differences(folders)
    for base in (0, 1):
        with suppress(CheckpointError, SpecError):
            plan_vocabulary(folders, [8, 8], base=base)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (spec, safetensors, pickled, index, config, adapter, tokenizer, tokenizer_config)
}


def seeds(name: str) -> list[bytes]:
    """The small inputs that a target starts from."""
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


torch.set_num_threads(1)
