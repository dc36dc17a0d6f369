"""Imports without garbage collection, and without what merges do not use."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergecore.starting import SELDOM_USED, importing
from tests.models import llama, spec_dict, write_trio


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable() if was_on else gc.disable()


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_inside_and_is_afterwards_as_it_was(was_on: bool) -> None:
    gc.enable() if was_on else gc.disable()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() == was_on


def test_the_collector_is_on_again_after_an_import_that_failed() -> None:
    gc.enable()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_what_was_made_inside_is_not_looked_at_again_and_what_comes_later_is() -> None:
    with importing():
        kept = [[]]  # type: list[list[object]]
    assert not any(one is kept for one in gc.get_objects())
    later: list[list[object]] = [[]]
    assert any(one is later for one in gc.get_objects())


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_is_seldom_used_is_loaded_when_something_of_it_is_used() -> None:
    program = """
        import inspect, sys, threading
        from mergecore.starting import SELDOM_USED, importing
        with importing():
            import torch
        inspect.getmodule(torch.nn.Linear.forward)  # asks all modules for their file
        assert not any("activate_meta" in vars(sys.modules[name]) for name in SELDOM_USED)
        stand_in = torch._meta_registrations
        found = []
        use = lambda: found.append(stand_in.pooling_output_shape)
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = sys.modules["torch._meta_registrations"]
        assert real is not stand_in and real is torch._meta_registrations
        print(len(found), all(one is real.pooling_output_shape for one in found))
        """
    assert run(program).split() == ["4", "True"]


def test_what_runs_models_has_all_of_torch() -> None:
    program = """
        from mergecore.starting import importing
        with importing():
            import torch
        on_meta = torch.empty(3, device="meta")
        try:
            on_meta.angle()  # its shape is told by torch._meta_registrations
        except NotImplementedError:
            print("not there")
        import mergecore.features
        print(on_meta.angle().shape)
        """
    assert run(program).splitlines() == ["not there", "torch.Size([3])"]


def test_a_process_that_had_torch_keeps_it_whole() -> None:
    program = """
        import sys, torch
        from mergecore.starting import SELDOM_USED, importing, load_deferred
        before = [sys.modules[name] for name in SELDOM_USED]
        with importing():
            pass
        load_deferred()
        print(all(module is sys.modules[name] for module, name in zip(before, SELDOM_USED, strict=True)))
        """
    assert run(program).strip() == "True"


def test_a_merge_does_not_load_it(tmp_path: Path) -> None:
    spec = spec_dict("widen", *write_trio(tmp_path, llama()))
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    command = [sys.executable, "-X", "importtime", "-m", "mergecore.cli", "merge", "spec.yaml", "out"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch.functional" in loaded
    assert not loaded & set(SELDOM_USED)
