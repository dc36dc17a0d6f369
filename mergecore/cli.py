"""The command line. Imports what a command needs when it runs: `--help` and the daemon load no torch.

Exit codes: 0 done, 1 the merge failed, 2 the spec or the arguments are wrong, 3 interrupted (resumable).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecore import __version__
from mergecore.errors import Interrupted, MergecoreError, SpecError
from mergecore.printable import printable, printable_lines
from mergecore.sizes import told_size
from mergecore.starting import importing

if TYPE_CHECKING:
    from mergecore.progress import Progress
    from mergecore.spec import MergeSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # Threads that spin while they wait take the cores from the reader, the writer and other jobs (workers inherit
    # this). NumPy's BLAS, for which there is little to do, would start one for each core. Both are read when
    # torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Lines()])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths are bytes, and not always text
    try:
        code: int = options.run(options)
        return code
    except MergecoreError as error:
        print(f"mergecore: {printable_lines(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before or after the merge itself, which ends in order
        print("mergecore: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1


class _Lines(logging.Handler):
    """Prints to what sys.stderr is now: a progress bar puts lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable_lines(self.format(record)), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mergecore", description="Merges language models by streaming their weights.")
    parser.add_argument("--version", action="version", version=f"mergecore {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    for name, run, summary in (
        ("merge", _merge, "merge the models of SPEC into the new model directory OUT"),
        ("evolve", _evolve, "search for the parameters that SPEC's evolve names, and merge with the best into OUT"),
    ):
        sub = command(name, run, summary)
        sub.add_argument("spec", type=Path, metavar="SPEC")
        sub.add_argument("out", type=Path, metavar="OUT")
        _add_run_options(sub)
        sub.add_argument("--resume", action="store_true", help="continue what was interrupted: same spec, same inputs")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")

    sub = command("plan", _plan, "show what SPEC would read, write and hold in memory; no tensor is read")
    sub.add_argument("spec", type=Path, metavar="SPEC")
    _add_run_options(sub)
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")

    sub = command("verify", _verify, "recompute the checksums of the output directory OUT")
    sub.add_argument("out", type=Path, metavar="OUT")

    sub = command("inspect", _inspect, "list the tensors of MODEL")
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--json", action="store_true", help="print the list as JSON")

    sub = command("stats", _stats, "gather statistics of MODEL on samples of text, for regmean and fisher")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL or text file of samples")
    sub.add_argument("--out", type=Path, required=True, metavar="STATS", help="the new folder of statistics")
    sub.add_argument("--kind", choices=("regmean", "fisher", "both"), default="both", help="for which method (both)")
    sub.add_argument("--samples", type=_count, default=30, metavar="N", help="texts that are drawn (30)")
    sub.add_argument("--length", type=_count, default=512, metavar="N", help="tokens of a text at most (512)")
    sub.add_argument("--field", default="text", help="in JSONL objects: the key of the text (text)")
    sub.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    sub.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="the model is run in (float32)"
    )
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")

    sub = command("linearity", _linearity, "measure how linear MODELs and their submodules are in the weights")
    sub.add_argument("base", metavar="BASE")
    sub.add_argument("models", metavar="MODEL", nargs="+")
    sub.add_argument("--data", action="append", required=True, metavar="FILE", help="samples, one file for each MODEL")
    sub.add_argument("--level", default="attn_mlp", choices=("layer", "attn_mlp", "head_mlp", "model"))
    sub.add_argument("--samples", type=int, default=30, metavar="N", help="texts drawn from each file (30)")
    sub.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text at most (512)")
    sub.add_argument("--field", default="text", help="key of the text in JSONL objects (text)")
    sub.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    sub.add_argument("--seed", type=int, default=0, metavar="N")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    sub.add_argument("--json", action="store_true", help="print the measures as JSON")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw them into an SVG, PNG or PDF file")

    command("methods", _methods, "list the merge methods and their parameters")
    command("schema", _schema, "print the JSON Schema of specs, for editors")

    sub = command("serve", _serve, "watch a spool folder and run the specs dropped into it")
    _add_serve_options(sub)
    sub = command("doctor", _doctor, "check whether this host is ready for the daemon, and say what to mend")
    _add_serve_options(sub)
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")

    sub = command("submit", _submit, "put SPEC into the spool")
    sub.add_argument("spec", type=Path, metavar="SPEC")
    _add_spool_options(sub)
    sub.add_argument("--force", action="store_true", help="run it though the same was done before")
    sub = command("status", _status, "show the jobs of the spool, or one JOB")
    sub.add_argument("job", nargs="?", metavar="JOB")
    _add_spool_options(sub)
    sub.add_argument("--json", action="store_true", help="print the status as JSON")
    for name, summary in (("cancel", "stop JOB, or take a waiting spec out"), ("retry", "run a failed JOB again")):
        sub = command(name, _steer, summary)
        sub.add_argument("job", metavar="JOB")
        _add_spool_options(sub)
        sub.set_defaults(command=name)
    for name, summary in (
        ("pause", "start no more jobs; what runs goes on"),
        ("resume", "start jobs again after a pause"),
        ("drain", "have the daemons finish what they run, and end"),
    ):
        sub = command(name, _steer, summary)
        _add_spool_options(sub)
        sub.set_defaults(command=name)
    return parser


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="cpu, cuda, cuda:N, cuda:N+M (several) or auto")
    sub.add_argument("--memory", type=_size, metavar="SIZE", help="memory for windows and statistics, such as 256MiB")
    sub.add_argument("--threads", type=int, metavar="N", help="threads that compute (0: all cores)")


def _add_serve_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the options below")
    sub.add_argument("--spool", type=Path, metavar="DIR")
    sub.add_argument("--outputs", type=Path, metavar="DIR", help="where merged models go")
    sub.add_argument("--models", type=Path, metavar="DIR", action="append", help="where models lie; may be repeated")
    sub.add_argument("--host", help="address of the metrics endpoint (127.0.0.1)")
    sub.add_argument("--port", type=int, help="port of the metrics endpoint (9417; 0 picks one)")
    sub.add_argument("--jobs", type=int, help="jobs that run at once (1)")


def _add_spool_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--spool", type=Path, metavar="DIR")
    sub.add_argument("--config", type=Path, metavar="FILE", help="the daemon's TOML file, which names the spool")


def _size(text: str) -> int:
    from mergecore.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MiB, 1GiB or 5GB") from None


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def _evolve(options: argparse.Namespace) -> int:
    from mergecore.spec import load_spec

    spec = load_spec(options.spec)
    if spec.evolve is None:
        raise SpecError(f"{options.spec} has no section evolve; docs/spec.md describes it, or run `mergecore merge`")
    return _merge_spec(spec, options)


def _merge(options: argparse.Namespace) -> int:
    from mergecore.spec import load_spec

    return _merge_spec(load_spec(options.spec), options)


def _merge_spec(spec: MergeSpec, options: argparse.Namespace) -> int:
    with importing():
        from mergecore.merging import merge

    with _stop_on_signals() as stopped, _bar() as show:

        def progress(now: Progress) -> None:
            show(str(now), now.bytes_read, now.bytes_read_total)

        result = merge(
            spec,
            options.out,
            device=options.device,
            memory=options.memory,
            threads=options.threads,
            resume=options.resume,
            progress=progress,
            should_stop=stopped.is_set,
        )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print(
            f"{result.output}: {result.tensors} tensors by {result.method}, read {told_size(result.bytes_read)}, "
            f"wrote {told_size(result.bytes_written)} in {result.seconds:.1f} s, "
            f"peak memory {result.peak_rss / 2**20:.0f} MiB"
        )
    return 0


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Sets the event at SIGINT or SIGTERM; a second one ends the process as usual."""
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows (what, bytes done, bytes in all) on stderr: a bar on a terminal, a log line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _log_lines(interval: float = 10.0) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def log(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= interval:
            last = time.monotonic()
            logging.info("%s, %s of %s", what, told_size(done), told_size(total))

    return log


def _plan(options: argparse.Namespace) -> int:
    from mergecore.planning import plan, with_run
    from mergecore.spec import load_spec

    spec = with_run(load_spec(options.spec), device=options.device, memory=options.memory, threads=options.threads)
    if spec.sweep is not None:
        from mergecore import sweep_report
        from mergecore.sweeping import plan_sweep

        sweep = plan_sweep(spec)
        facts, lines = sweep_report.facts(sweep), sweep_report.lines(sweep)
    else:
        from mergecore import plan_report

        facts = plan_report.facts(plan(spec), spec.evolve)
        lines = plan_report.lines(facts, spec.evolve)
    print(json.dumps(facts, indent=2) if options.json else "\n".join(map(printable, lines)))
    return 0


def _linearity(options: argparse.Namespace) -> int:
    from mergecore.features.commands import linearity_command

    return linearity_command(options)


def _verify(options: argparse.Namespace) -> int:
    from mergecore.output.verify import verify_output

    with _bar() as show:
        problems = verify_output(options.out, lambda done, total: show("checked", done, total))
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    if not problems:
        print(f"{options.out}: all tensors are as the manifest says")
    return 1 if problems else 0


def _inspect(options: argparse.Namespace) -> int:
    from rich.table import Table

    from mergecore.checkpoint import open_checkpoint

    model = open_checkpoint(options.model)
    if options.json:
        tensors = {
            name: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes, "file": info.file.name}
            for name, info in model.tensors.items()
        }
        print(json.dumps({"path": str(model.path), "tensors": tensors, **model.fingerprint()}, indent=2))
        return 0
    table = Table("tensor", "dtype", "shape", "bytes", "file")
    for info in model.tensors.values():
        table.add_row(
            printable(info.name),
            info.dtype,
            "x".join(map(str, info.shape)),
            f"{info.nbytes:,}",
            printable(info.file.name),
        )
    _print_table(table)
    total = sum(info.nbytes for info in model.tensors.values())
    print(f"{len(model.tensors)} tensors, {told_size(total)}, {len(model.files)} file(s)")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from mergecore.features.gather import gather

    with _stop_on_signals() as stopped, _bar() as show:
        result = gather(
            options.model,
            options.data,
            options.out,
            kind=options.kind,
            samples=options.samples,
            length=options.length,
            field=options.field,
            seed=options.seed,
            dtype=options.dtype,
            device=options.device,
            progress=show,
            should_stop=stopped.is_set,
        )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0
    print(
        f"{result.output}: {' and '.join(result.kinds)} of {result.tensors} tensors from {result.samples} texts of "
        f"{result.tokens} tokens, wrote {told_size(result.bytes_written)} in {result.seconds:.1f} s"
    )
    if result.left_out:
        print(f"{len(result.left_out)} matrices have no Gram matrix and will be averaged by regmean")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from rich.table import Table

    from mergecore.methods import METHODS

    for method in METHODS.values():
        print(f"{method.name}: {method.summary}\n  {method.reference}")
        table = Table("parameter", "default", "where", "meaning", box=None, pad_edge=True)
        for parameter in method.parameters:
            table.add_row(
                parameter.name,
                json.dumps(parameter.default),
                "per model" if parameter.per_model else "merge",
                parameter.meaning,
            )
        _print_table(table)
        print()
    return 0


def _print_table(table: Any) -> None:
    from rich.console import Console

    # Piped output is for programs and grep: lines are not folded. Names are text: no markup, no emoji.
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False, emoji=False).print(table)


def _schema(options: argparse.Namespace) -> int:
    from mergecore.spec import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from service.daemon import serve_command

    return serve_command(options.config, _overrides(options))


def _doctor(options: argparse.Namespace) -> int:
    from service.doctor import doctor_command

    return doctor_command(options.config, _overrides(options), options.json)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    names = ("spool", "outputs", "models", "host", "port", "jobs")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _spool(options: argparse.Namespace) -> Path:
    if options.spool is not None:
        return Path(options.spool)
    if options.config is None:
        raise SpecError("name the spool: --spool DIR, or --config FILE of the daemon")
    from service.daemon import load_config

    return Path(load_config(options.config).spool)


def _submit(options: argparse.Namespace) -> int:
    from service.daemon import submit_command

    print(submit_command(options.spec, _spool(options), options.force))
    return 0


def _steer(options: argparse.Namespace) -> int:
    from service import commands

    run = getattr(commands, f"{options.command}_command")
    told = run(_spool(options), options.job) if "job" in options else run(_spool(options))
    if told is not None:
        print(told)
    return 0


def _status(options: argparse.Namespace) -> int:
    from service.daemon import status_command

    return status_command(_spool(options), options.job, options.json)


if __name__ == "__main__":
    sys.exit(main())
