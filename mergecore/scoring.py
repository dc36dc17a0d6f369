"""The score of a candidate, a model directory on disk: what a command prints, or bits per byte of texts.

Commands run without a shell, in a process group of their own, which ends with them. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mergecore.errors import CheckpointError, MergecoreError
from mergecore.inputs import Resolve
from mergecore.spec import MergeSpec

if TYPE_CHECKING:
    from mergecore.planning import MergePlan

Scorer = Callable[[Path, Callable[[], None]], float]
"""(model directory, called a few times a second and may raise Interrupted) -> finite score; raises ScoreError."""

TIMEOUT = 3600.0
SAMPLES, LENGTH = 16, 256
PAUSE = 0.1
"""Seconds between two looks at a command."""
TAIL = 64 << 10
"""Bytes that are kept of what a command prints."""

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\b(?:nan|inf(?:inity)?)\b)", re.I)

# Exec'ed through Python so that the kernel kills the command when we die, however we die: 1 is PR_SET_PDEATHSIG.
_LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if str(os.getppid()) != sys.argv[1]:
    sys.exit("mergecore is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class ScoreError(MergecoreError):
    """A candidate could not be scored."""


def check_score(spec: MergeSpec, resolve: Resolve) -> None:
    """SpecError if the text files or the program of the score are not there."""
    assert spec.evolve is not None
    if spec.evolve.score.command is None:
        texts(spec, resolve)
    else:
        _command(spec)


def texts(spec: MergeSpec, resolve: Resolve) -> list[Path]:
    """The text files of the score, found as models are. Raises SpecError."""
    assert spec.evolve is not None
    found = []
    for number, name in enumerate(spec.evolve.score.text or ()):
        keys = ("evolve", "score", "text", number)
        try:
            path = resolve(name, None)
        except CheckpointError as error:
            raise spec.error(str(error), *keys) from None
        if not path.is_file():
            raise spec.error(f"{path} is not a file; expected JSONL or text", *keys)
        found.append(path)
    return found


def open_scorer(spec: MergeSpec, resolve: Resolve, planned: MergePlan) -> Scorer:
    """What scores the candidates of a spec, which are like the `planned` one. Raises SpecError, and CheckpointError if
    they will be no causal language models with a tokenizer."""
    assert spec.evolve is not None
    wanted = spec.evolve.score
    if wanted.command is not None:
        words, timeout, place = _command(spec), wanted.timeout or TIMEOUT, spec.directory
        return lambda model, tick: run_command(words, model, place, timeout, tick)
    from mergecore.features.passes import Network
    from mergecore.features.perplexity import bits_per_byte
    from mergecore.features.samples import read_samples, tokenizer_in

    files, samples, length = texts(spec, resolve), wanted.samples or SAMPLES, wanted.length or LENGTH
    seed = spec.evolve.seed
    tokenizer = tokenizer_in(None, planned.tokenizer)
    for path in files:
        read_samples(path, tokenizer, count=samples, length=length, seed=seed)
    Network(planned.config, {job.name: job.shape for job in planned.jobs})

    def score(model: Path, tick: Callable[[], None]) -> float:
        found = bits_per_byte(model, files, samples=samples, length=length, seed=seed, tick=tick)
        return _finite(math.fsum(found) / len(found), "bits per byte of the texts")

    return score


def run_command(words: list[str], model: Path, place: Path, timeout: float, tick: Callable[[], None]) -> float:
    """Runs a command in the folder `place` and returns the last number of its standard output. Raises ScoreError.

    {model} in a word stands for the model. At the end, whatever it is, what is left of the process group is killed.
    """
    filled = [word.replace("{model}", os.path.abspath(model)) for word in words]
    command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *filled]
    name, until = words[0], time.monotonic() + timeout
    with subprocess.Popen(
        command,
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as process:
        try:
            printed, complained = _followed(process, tick, until)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if time.monotonic() >= until:
        raise ScoreError(f"{name} was killed after {timeout:g} seconds")
    if process.returncode != 0:
        how = f"exit code {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        said = " ".join(complained.decode(errors="replace").split()[-60:])
        raise ScoreError(f"{name} ended with {how}" + (f": {said}" if said else " and said nothing"))
    numbers = _NUMBER.findall(printed.decode(errors="replace"))
    if not numbers:
        raise ScoreError(f"{name} printed no number; expected the score as the last one on its standard output")
    return _finite(float(numbers[-1]), name)


def _followed(process: subprocess.Popen[bytes], tick: Callable[[], None], until: float) -> tuple[bytes, bytes]:
    """The ends of both outputs of a process, until it ends or its time is up."""
    assert process.stdout is not None
    assert process.stderr is not None
    tails = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    with selectors.DefaultSelector() as selector:
        for descriptor in tails:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the look: what it has printed is there
            ready = selector.select(PAUSE) if selector.get_map() else []
            for key, _ in ready:
                data = os.read(key.fd, TAIL)
                tails[key.fd] = (tails[key.fd] + data)[-TAIL:]
                if not data:
                    selector.unregister(key.fd)
            if ended and not any(key.fd in selector.get_map() for key, _ in ready):
                break  # a process that it has left behind may hold the pipes open
            if time.monotonic() >= until:
                break
            if not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PAUSE)
            tick()
    return tails[process.stdout.fileno()], tails[process.stderr.fileno()]


def _command(spec: MergeSpec) -> list[str]:
    assert spec.evolve is not None
    assert spec.evolve.score.command is not None
    keys = ("evolve", "score", "command")
    try:
        words = shlex.split(spec.evolve.score.command)
    except ValueError as error:
        raise spec.error(f"cannot be split into words: {error}", *keys) from None
    program = spec.directory / words[0] if "/" in words[0] else Path(words[0])
    if shutil.which(program) is None:
        raise spec.error(f"{words[0]} is not a program that can be run", *keys)
    return words


def _finite(score: float, who: str) -> float:
    if not math.isfinite(score):
        raise ScoreError(f"{who}: the score is {score}, expected a finite number")
    return score
