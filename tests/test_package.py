"""The package: what importing it costs, what it exports, and what a build without its needs says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import mergecore

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    """What the code prints in a new interpreter, in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import mergecore",
        "import mergecore.cli",
        "from mergecore import load_spec",
        "import mergecore.checkpoint, mergecore.output.layout, mergecore.output.verify",
        "import service.daemon",
        "import service.commands",
        "import service.worker",
    ],
)
def test_what_does_not_compute_imports_no_torch(statement: str) -> None:
    assert python(f"import sys\n{statement}\nprint('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["merge", "--help"], ["--version"], ["schema"], ["inspect", "nowhere"]]
)
def test_commands_that_do_not_compute_import_no_torch(arguments: list[str]) -> None:
    code = f"""
import contextlib, io, sys
from mergecore import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        cli.main({arguments!r})
print('torch' in sys.modules)
"""
    assert python(code) == "False\n"


def test_the_names_that_users_import_are_there() -> None:
    assert {name for name in mergecore.__all__ if getattr(mergecore, name, None) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'unmerge'"):
        mergecore.unmerge  # noqa: B018


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mergecore.__version__
    assert project["scripts"]["mergecore"] == "mergecore.cli:main"


def test_every_package_of_python_code_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for top in ("mergecore", "service") for path in (ROOT / top).rglob("*.py")}
    assert {str(path).replace("/", ".") for path in found} == set(listed)


# ---- Building


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, and an empty folder `stubs` for modules that hide the real ones."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "mergecore", "service"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "stubs").mkdir()
    return tmp_path


def test_a_source_distribution_has_all_that_a_build_reads(source: Path) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert wanted <= names
    assert "service/deploy/mergecore.service" in names


def refusal(source: Path, **environment: str) -> str:
    """The one line with which building ends."""
    ended = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source / "stubs"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("mergecore: ")
    return line


def test_a_build_without_torch_says_how_to_get_it(source: Path) -> None:
    (source / "stubs" / "torch.py").write_text("raise ImportError('hidden')")
    assert "needs torch: run `make setup`" in refusal(source)


def test_a_build_with_an_old_torch_says_which_is_needed(source: Path) -> None:
    torch = source / "stubs" / "torch"
    (torch / "utils").mkdir(parents=True)
    (torch / "__init__.py").write_text("__version__ = '2.9.1+cpu'")
    (torch / "utils" / "__init__.py").touch()
    names = "CUDA_HOME = BuildExtension = CppExtension = CUDAExtension = None"
    (torch / "utils" / "cpp_extension.py").write_text(names)
    assert "torch 2.9.1+cpu is too old: the kernels need torch 2.10 or later" in refusal(source)


def test_a_build_without_pybind11_says_how_to_get_it(source: Path) -> None:
    (source / "stubs" / "pybind11.py").write_text("raise ImportError('hidden')")
    assert "needs pybind11: run `make setup`" in refusal(source)


def test_a_build_without_a_compiler_says_how_to_get_one(source: Path) -> None:
    assert "no C++ compiler: '/nonexistent/c++' was not found; install g++" in refusal(source, CXX="/nonexistent/c++")


def test_a_missing_build_of_the_kernels_is_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mergecore", tmp_path / "mergecore", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ended = subprocess.run(
        [sys.executable, "-c", "import mergecore.ops"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "the kernels are not built" in ended.stderr.splitlines()[-1]
    assert "make setup" in ended.stderr.splitlines()[-1]
