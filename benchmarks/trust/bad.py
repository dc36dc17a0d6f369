"""Bad specs: each ends with a clear error, and the daemon stays up and small."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

from benchmarks.trust.daemon import RESIDENT_LIMIT, Daemon, visible, wait
from service.spool import ERROR


def bad_specs(models: Path) -> dict[str, bytes]:
    """Name -> spec, one of each kind; the model folders that some of them need are made below `models`."""
    from benchmarks.checkpoints import GEOMETRIES, make

    make(models, GEOMETRIES["tiny"])
    good = {
        "merge_method": "linear",
        "models": [{"model": "base", "parameters": {"weight": 1.0}}, {"model": "tuned", "parameters": {"weight": 1.0}}],
    }
    text: dict[str, bytes] = {
        "only blanks": b"  \n",
        "only a comment": b"# nothing\n",
        "binary": bytes(range(256)),
        "not utf-8": b"merge_method: caf\xe9\n",
        "null bytes": b"merge_method: linear\0\n",
        "a list": b"- 1\n- 2\n",
        "a word": b"merge\n",
        "a number": b"42\n",
        "an open bracket": b"models: [\n",
        "a tab as indentation": b"models:\n\t- model: base\n",
        "a repeated key": b"merge_method: linear\nmerge_method: ties\n",
        "a bomb of aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
        "an alias to itself": b"models: &a [*a]\n",
        "an unknown alias": b"models: *nothing\n",
        "a python tag": b"!!python/object/apply:os.system ['touch /nowhere/evil']\n",
        "a deep nest": b"[" * 100_000,
        "a deep nest of mappings": b"{a: " * 20_000,
        "a huge file": b"#" * (64 << 20),
        "a huge number": b"merge_method: linear\nseed: " + b"9" * 100_000 + b"\n",
        "json that is torn": b'{"merge_method": "linear", "models": [{"model"',
    }
    changed: dict[str, Any] = {
        "an unknown method": {"merge_method": "widden"},
        "no method": {"merge_method": None},
        "a method that is a list": {"merge_method": ["linear"]},
        "an unknown key": {"modles": []},
        "no models": {"models": []},
        "models that are a word": {"models": "base"},
        "a model without a name": {"models": [{"parameters": {"weight": 1.0}}]},
        "an unknown parameter": {"parameters": {"wieght": 1.0}},
        "a weight that is a word": {"models": [{"model": "base", "parameters": {"weight": "much"}}]},
        "a weight that is not a number": {"parameters": {"weight": float("nan")}},
        "a weight that is infinite": {"parameters": {"weight": float("inf")}},
        "a gradient of words": {"models": [{"model": "base", "parameters": {"weight": [0, "one"]}}]},
        "a density above one": {"merge_method": "ties", "base_model": "base", "parameters": {"density": 2.0}},
        "a base that is needed": {"merge_method": "ties"},
        "an unknown dtype": {"dtype": "float13"},
        "an unknown key of run": {"run": {"ouput": "a"}},
        "a memory that is none": {"run": {"memory": "much"}},
        "a negative number of threads": {"run": {"threads": -1}},
        "an unknown device": {"run": {"device": "abacus"}},
        "an output above the folder": {"run": {"output": "../evil"}},
        "an absolute output": {"run": {"output": "/tmp/evil"}},
        "a hidden output": {"run": {"output": ".evil"}},
        "an output of nothing": {"run": {"output": ""}},
        "a model that is absent": {"models": [{"model": "absent"}]},
        "a model outside": {"models": [{"model": "/etc"}]},
        "a model above": {"models": [{"model": "../../etc"}]},
        "a model with a null byte": {"models": [{"model": "a\0b"}]},
        "a model with a long name": {"models": [{"model": "x" * 5000}]},
        "slices and models": {"slices": [{"sources": [{"model": "base", "layer_range": [0, 1]}]}]},
        "layers that are not there": {
            "models": None,
            "slices": [{"sources": [{"model": "base", "layer_range": [0, 99]}]}],
        },
        "an unknown tokenizer": {"tokenizer_source": "nobody"},
    }
    weights = (models / "base" / "model-00001.safetensors").read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    one = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    damaged = {
        "weights that end early": weights[: len(weights) // 2],
        "weights of nothing": b"",
        "a header longer than the file": struct.pack("<Q", 1 << 62) + weights[8:],
        "a header that is no JSON": struct.pack("<Q", length) + b"x" * length + weights[8 + length :],
        "tensors that overlap": with_header(one + b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', 12),
        "a shape that does not fit": with_header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}', 8),
        "an unknown dtype in a header": with_header(b'{"a": {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]}}', 8),
        "a header of nests": with_header(b"[" * 100_000, 0),
    }
    for kind, content in damaged.items():
        folder = models / kind.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(content)
        changed[kind] = {"models": [{"model": "base"}, {"model": folder.name}], "parameters": {"weight": 1.0}}
    (models / "pickle").mkdir()
    (models / "pickle" / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
    (models / "pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /nowhere/evil'\ntR.")
    changed["a pickle that runs something"] = {"models": [{"model": "pickle"}], "parameters": {"weight": 1.0}}
    return text | {kind: json.dumps({**good, **change}).encode() for kind, change in changed.items()}


def with_header(header: bytes, nbytes: int) -> bytes:
    """A safetensors file with this header and so many bytes of data."""
    return struct.pack("<Q", len(header)) + header + bytes(nbytes)


def bad(work: Path, count: int) -> dict[str, Any]:
    """Bad specs of all kinds in turn."""
    daemon = Daemon(work, jobs=2, attempts=1)
    specs = bad_specs(daemon.models)
    kinds = list(specs)
    daemon.spool.prepare()
    daemon.start()
    daemon.url()
    time.sleep(1)
    before = daemon.resident()
    started = time.monotonic()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name = f"{number:05d}.yaml"
        path = daemon.spool.root / f"{name}.new"
        path.write_bytes(specs[kind])
        os.rename(path, daemon.spool.incoming / name)
        wait(lambda: len(visible(daemon.spool.incoming)) < 50, 600, "the daemon to keep up")  # 64 MB each
    wait(lambda: daemon.ended() >= count, 60 + 10 * count, "all to end")
    seconds = time.monotonic() - started
    after = daemon.resident()
    alive = daemon.process.poll() is None
    daemon.stop()

    unclear: dict[str, str] = {}
    failed = 0
    for status in daemon.spool.jobs():
        kind = kinds[int(status.spec[:5]) % len(kinds)]
        folder = daemon.spool.failed / status.job
        paragraph = (folder / ERROR).read_text().split("\n\n")[0] if (folder / ERROR).exists() else ""
        failed += status.state == "failed"
        if status.state != "failed" or not clear(paragraph):
            unclear[kind] = f"{status.state}: {paragraph[:200]}"
    outputs = visible(daemon.outputs)
    return {
        "specs": count,
        "kinds": min(len(kinds), count),
        "in failed/ with an error": failed,
        "kinds without a clear error": unclear,
        "outputs": len(outputs),
        "daemon restarts": daemon.starts - 1 + (not alive),
        "resident bytes before": before,
        "resident bytes after": after,
        "seconds": round(seconds, 1),
        "ok": failed == count and alive and not unclear and not outputs and after < RESIDENT_LIMIT,
    }


def clear(paragraph: str) -> bool:
    """Whether an error says something, and is none that nobody foresaw."""
    return bool(paragraph) and not re.search(r"unexpected error|Traceback|no report|killed by", paragraph)
