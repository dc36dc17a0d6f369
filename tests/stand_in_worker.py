"""A worker that merges nothing: for tests of the spool protocol with real processes. Its spec says what to do, in JSON:

steps: 3            so many steps, each recorded in OUTPUTS/SPEC_NAME.steps; an earlier attempt's are not repeated
gate: NAME          before the last step, wait until OUTPUTS/NAME exists
method: widen       what it reports
bytes: 1000         read and written per step
exit: 2             end with this code, after writing error.txt if it is 1 or 2
signal: 9           die of this signal
deaf: true          do not listen to SIGTERM
deaths: 2           so many attempts die of `signal`; later ones do not
hang: true          sleep at the gate and look no more
spin: true          use the processor while waiting at the gate

Like a real one it can wait for its job (--wait).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

from service.handover import WAIT, wait_for_job
from service.status import read_status, write_status
from service.worker import follow_daemon


def main() -> int:
    """Run the job in argv[1]; the exit code."""
    faulthandler.enable()
    arguments = sys.argv[1:]
    if arguments == [WAIT]:
        follow_daemon()
        job = wait_for_job(lambda: None)
        if job is None:
            return 0
        arguments = job
    folder, outputs = Path(arguments[0]), Path(arguments[arguments.index("--outputs") + 1])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    spec = json.loads((folder / "spec.yaml").read_text())
    status = read_status(folder)
    status.pid, status.method = os.getpid(), spec.get("method", "linear")
    write_status(folder, status)
    record(outputs, f"start {status.spec} {folder.name}")
    steps, total = outputs / f"{status.spec}.steps", int(spec.get("steps", 1))

    first = steps.stat().st_size if steps.exists() else 0
    for step in range(first, total):
        while step == total - 1 and "gate" in spec and not (outputs / spec["gate"]).exists():
            if stopped and not spec.get("deaf"):
                record(outputs, f"stop {status.spec} {folder.name}")
                return 3
            if not spec.get("spin"):
                time.sleep(1000 if spec.get("hang") and status.deaths < spec.get("deaths", 9) else 0.01)
        with steps.open("ab") as file:
            file.write(b".")
        moved = spec.get("bytes", 1000)
        status.progress = {
            "ratio": (step + 1) / total,
            "tensors_done": step + 1 - first,
            "tensors_total": total,
            "bytes_read": (step + 1 - first) * moved,
            "bytes_written": (step + 1 - first) * moved,
        }
        write_status(folder, status, durable=False)

    if "signal" in spec and status.deaths < spec.get("deaths", 9):
        os.kill(os.getpid(), spec["signal"])
    code = int(spec.get("exit", 0))
    if code in (1, 2):
        (folder / "error.txt").write_text("the spec asks for a failure\n\nTraceback\n")
        status.error = "the spec asks for a failure"
    elif code == 0:
        status.result = {"tensors": total}
    write_status(folder, status)
    record(outputs, f"end {status.spec} {folder.name}")
    return code


def record(outputs: Path, line: str) -> None:
    """Append to the log of everything that stand-ins do below `outputs`."""
    with (outputs / "record").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
