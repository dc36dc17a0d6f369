"""`mergecore doctor`: is this host ready for the daemon as configured, and if not, what is to be mended.

Each check is a function from the configuration to findings. They leave nothing behind, and torch is imported only in a
process of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from mergecore.errors import MergecoreError
from service.config import ServeConfig, load_config
from service.endpoint import Endpoint
from service.host import free_and_size, memory_limit
from service.process import package_environment
from service.resources import WORKER_BYTES
from service.spool import FOLDERS, Spool

LITTLE_SPACE = 20e9
"""Bytes: less than the output of a 7B merge and change."""
LITTLE_MEMORY = 3 << 30
"""Bytes per job: torch, the windows of the default budget, and room for the file cache."""
SLOW = 50e6
"""Bytes per second."""
PROBE_BYTES = 64 << 20
FEW_FILES = 1024

_PROBE = """
import json, sys
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["cuda"] = torch.version.cuda
    import mergecore.ops, mergecore._stream
    found["kernels"] = True
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True)
class Finding:
    """What a check found. `state`: ok, warning (works, but), wrong (will not work)."""

    check: str
    state: str
    message: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.check:<12} {self.message}"
        return f"{line}; {self.mend}" if self.mend else line


def doctor_command(file: Path | None, overrides: Mapping[str, Any], as_json: bool = False) -> int:
    """Check this host and print one line per finding, or JSON; 1 if something is wrong, else 0."""
    found = []
    for one in examine(file, overrides):
        found.append(one)
        if not as_json:
            print(" ".join(str(one).split("\n")), flush=True)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    return 1 if any(one.state == "wrong" for one in found) else 0


def examine(file: Path | None, overrides: Mapping[str, Any]) -> Iterator[Finding]:
    """Every finding, as it is found."""
    try:
        config = load_config(file, overrides)
    except MergecoreError as error:
        yield Finding("config", "wrong", str(error), "mend it, and run this again")
        return
    yield Finding("config", "ok", "can be read" if file is None else f"{file} can be read")
    for check in CHECKS:
        yield from check(config)


def check_user(config: ServeConfig) -> Iterator[Finding]:
    """Whether this is the user that the daemon will be."""
    existing = next((folder for folder in (config.spool, config.outputs) if folder.exists()), None)
    if existing is None or existing.stat().st_uid == os.getuid():
        yield Finding("user", "ok", _user(os.getuid()))
    else:
        owner = _user(existing.stat().st_uid)
        mend = f"run this as the daemon's user: sudo -u {owner} mergecore doctor"
        yield Finding("user", "warning", f"{existing} belongs to {owner}, but this is {_user(os.getuid())}", mend)


def check_folders(config: ServeConfig) -> Iterator[Finding]:
    """Spool, outputs and models: there, with the permissions needed, the spool on one file system."""
    yield _spool(config)
    yield _writable("outputs", config.outputs)
    for folder in config.models:
        try:
            models = sum(entry.is_dir() for entry in os.scandir(folder))
            yield Finding("models", "ok", f"{folder} can be read: {models} folders")
        except OSError as error:
            mend = "mount it, or let the daemon's user read it"
            yield Finding("models", "wrong", f"{folder}: {error.strerror}", mend)
    if not config.models:
        mend = 'set models = ["/srv/models"] unless all who drop specs are trusted'
        yield Finding("models", "warning", "every path that the daemon's user can read may be merged", mend)


def check_space(config: ServeConfig) -> Iterator[Finding]:
    """Free space for spool and outputs."""
    for name, folder, little in (("spool", config.spool, 1e9), ("outputs", config.outputs, LITTLE_SPACE)):
        with contextlib.suppress(OSError):  # check_folders says what is wrong
            free, size = free_and_size(_nearest(folder))
            state = "ok" if free >= little else "warning" if free >= little / 20 else "wrong"
            mend = "" if state == "ok" else f"make room, or place {name} on a larger disk"
            yield Finding("space", state, f"{name}: {free / 1e9:.1f} of {size / 1e9:.1f} GB are free", mend)


def check_memory(config: ServeConfig) -> Iterator[Finding]:
    """Whether the memory suffices for so many jobs at once."""
    limit = memory_limit() if config.memory is None else min(config.memory, memory_limit())
    state = "ok" if limit >= LITTLE_MEMORY * config.jobs + WORKER_BYTES * config.warm_workers else "warning"
    mend = "" if state == "ok" else "lower jobs or warm_workers, or raise MemoryMax= of the unit"
    idle = f" and {config.warm_workers} idle worker(s)" if config.warm_workers else ""
    yield Finding("memory", state, f"{limit / 2**30:.1f} GiB for {config.jobs} job(s) at a time{idle}", mend)


def check_limits(config: ServeConfig) -> Iterator[Finding]:
    """Open files: each shard of each model is one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    state = "ok" if unlimited or soft >= FEW_FILES else "warning"
    mend = "" if state == "ok" else "set LimitNOFILE= in the unit, or ulimit -n"
    yield Finding("limits", state, f"{'any number of' if unlimited else soft} open files", mend)


def check_home(config: ServeConfig) -> Iterator[Finding]:
    """Whether the Hugging Face cache can be reached, which lies in the home folder unless the environment tells."""
    told = next((name for name in ("HF_HUB_CACHE", "HF_HOME") if os.environ.get(name)), None)
    mend = "set HF_HUB_CACHE to a folder that the daemon's user can read, if specs name models of the cache"
    try:
        place = Path(os.environ[told]) if told else Path.home() / ".cache" / "huggingface"
        nearest = _nearest(place)
        if os.access(nearest, os.R_OK | os.X_OK) and (told is None or place.is_dir()):
            yield Finding("home", "ok", f"Hugging Face cache: {place}{'' if place.is_dir() else ' (not there yet)'}")
        else:
            yield Finding("home", "warning", f"Hugging Face cache: {place} cannot be read", mend)
    except (OSError, RuntimeError):
        yield Finding("home", "warning", f"{_user(os.getuid())} has no home folder that can be read", mend)


def check_devices(config: ServeConfig) -> Iterator[Finding]:
    """torch, the kernels and the GPUs, as a worker sees them."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            capture_output=True,
            timeout=300,
            check=False,
            env=package_environment(),
        )
        found = json.loads(done.stdout or b"{}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        yield Finding("kernels", "wrong", f"torch cannot be tried: {error}", "reinstall mergecore")
        return
    if not found.get("kernels"):
        why = found.get("error") or f"Python ended with {done.returncode}"
        yield Finding("kernels", "wrong", f"do not load: {why}", "reinstall mergecore for the torch that is installed")
    else:
        yield Finding("kernels", "ok", f"load, with torch {found['torch']}")
    devices, built = found.get("devices", []), found.get("cuda")
    if devices:
        yield Finding("devices", "ok", f"{', '.join(devices)} (CUDA {built})")
    elif Path("/dev/nvidia0").exists():
        mend = "install torch for CUDA" if built is None else "check nvidia-smi and DeviceAllow= of the unit"
        yield Finding("devices", "warning", "there is a GPU, but torch does not see it", mend)
    elif found:
        yield Finding("devices", "ok", f"{os.cpu_count()} processors, no GPU")


def check_disk(config: ServeConfig) -> Iterator[Finding]:
    """The speed of the outputs' disk, with a small file."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=_nearest(config.outputs)) as file:
            begun = time.perf_counter()
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(len(block)):
                pass
            read = time.perf_counter()
    except OSError as error:
        yield Finding("disk", "wrong", f"{config.outputs}: {error.strerror}", "see what dmesg says about the disk")
        return
    speeds = PROBE_BYTES / (written - begun), PROBE_BYTES / (read - written)
    state = "ok" if min(speeds) >= SLOW else "warning"
    mend = (
        "" if state == "ok" else "merges are as fast as their disk: use a faster one, or read: pread on network mounts"
    )
    yield Finding("disk", state, f"outputs: {speeds[0] / 1e6:.0f} MB/s written, {speeds[1] / 1e6:.0f} MB/s read", mend)


def check_port(config: ServeConfig) -> Iterator[Finding]:
    """The metrics' port, certificate and password."""
    where = f"{config.host} port {config.port}"
    try:
        Endpoint(replace(config, port=0), CollectorRegistry()).close()
    except MergecoreError as error:
        yield Finding("port", "wrong", str(error))
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        yield Finding("port", "ok", f"{where} is free")
    except OSError as error:
        if _is_ours(config):
            yield Finding("port", "ok", f"a daemon answers at {where}")
        else:
            yield Finding("port", "wrong", f"{where}: {error.strerror}", "choose another port, or end what uses it")


CHECKS: tuple[Callable[[ServeConfig], Iterator[Finding]], ...] = (
    check_user,
    check_folders,
    check_space,
    check_memory,
    check_limits,
    check_home,
    check_port,
    check_disk,
    check_devices,
)


def _spool(config: ServeConfig) -> Finding:
    root = config.spool
    present = [name for name in FOLDERS if (root / name).exists()]
    if len(present) < len(FOLDERS):
        found = _writable("spool", root)
        return (
            replace(found, message=f"{found.message} (the daemon makes the folders)") if found.state == "ok" else found
        )
    try:
        spool = Spool(root)
        spool.prepare(config.agreed_ownership, agree=False)
        owned = "leased" if spool.leased else "locked"
    except MergecoreError as error:
        return Finding("spool", "wrong", str(error))
    return Finding("spool", "ok", f"{root}: jobs can be moved and {owned}")


def _writable(name: str, folder: Path) -> Finding:
    nearest = _nearest(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".probe-") as probe:
            os.link(probe.name, f"{probe.name}-2")
            os.unlink(f"{probe.name}-2")
    except OSError as error:
        mend = f"let {_user(os.getuid())} write there; under systemd also ReadWritePaths="
        return Finding(name, "wrong", f"{folder} cannot be written: {error.strerror}", mend)
    return Finding(name, "ok", f"{folder} can be {'written' if nearest == folder else 'made'}")


def _nearest(path: Path) -> Path:
    """`path`, or the first folder above it that exists."""
    return next((one for one in (path, *path.parents) if one.exists()), path)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _is_ours(config: ServeConfig) -> bool:
    """Whether what answers at the port is such a daemon; also one that wants a password first."""
    connection: http.client.HTTPConnection
    if config.certfile is None:
        connection = http.client.HTTPConnection(config.host, config.port, timeout=5)
    else:
        unverified = ssl._create_unverified_context()  # only who answers is asked
        connection = http.client.HTTPSConnection(config.host, config.port, timeout=5, context=unverified)
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().headers.get("Server") == "mergecore"
    except (OSError, http.client.HTTPException):
        return False
