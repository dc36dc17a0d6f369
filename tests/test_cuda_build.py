"""The CUDA kernels on a machine without a GPU: nvcc accepts them, and run on the host (cuda_emulation/)
they leave the bits of the CPU kernels in memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMULATION = Path(__file__).parent / "cuda_emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
COMPILER = os.environ.get("CXX", "c++")


def run(command: list[str | Path]) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of cuda_emulation/main.cpp, which stops at any access beyond its memory or off alignment."""
    folder = tmp_path_factory.mktemp("emulation")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]

    def build(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.name}.o"
        options: list[str | Path] = [*flags, "-DMERGECORE_CLONES=", "-I", EMULATION, "-x", "c++"]
        run([COMPILER, *options, *sanitizers, "-c", source, "-o", target])
        return target

    sources = [EMULATION / "main.cpp", *KERNELS, *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(build, sources))
    run([COMPILER, *sanitizers, *objects, "-o", folder / "emulation"])
    return folder / "emulation"


@pytest.mark.timeout(1200)  # under sanitizers, on a loaded machine
@pytest.mark.parametrize(
    ("op", "cases", "kernels"),
    [
        # bf16, f16, f32, mixed, mixed with f64; 16-byte loads or not; drops or none; the adding up of tiles
        ("column_moments", 300, 5 * 2 * 2 + 1),
        ("row_moments", 150, 5 * 2 * 2),
        # without drops, with a gradient of float32, and one for any other
        ("column_gradient", 300, 6 * 2 + 1),
        ("row_gradient", 100, 6 * 2),
        ("gram", 250, 5 * 2 + 1),
        ("row_gram", 60, 5 * 2),
        ("column_gram", 150, 5 * 2 + 1),
        ("blend", 6000, 5 * 2 * 2 * 4 - 1 + 5),  # to four dtypes; plain bf16 to bf16 in float32
        ("quick_blend", 1000, 5),  # coefficients by column or not; drops or none; their preparation
        ("rank", 150, 3),
        (
            "selection",
            400,
            3 + 6 + 4,
        ),  # elections to three dtypes; sums, magnitudes, ranks, kept deltas, three that count
        ("row_divergences", 60, 1),
        ("calibrated_softmax", 150, 1),
    ],
)
def test_every_kernel_leaves_the_bits_of_the_cpu_kernel(emulation: Path, op: str, cases: int, kernels: int) -> None:
    output = run([emulation, op, "1", str(cases)])
    assert f"ok {kernels}\n" in output


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_nvcc_compiles_without_warnings_and_keeps_values_in_registers(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed (Debian package nvidia-cuda-toolkit, or NVIDIA's CUDA toolkit)")
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    arithmetic = ["--fmad=false", "-Xcompiler", "-ffp-contract=off,-Wall,-Wextra"]
    options = ["-std=c++17", "-O3", *arithmetic, *targets, "-Xptxas", "-v", "--threads", "2"]
    output = run([nvcc, *options, "-c", source, "-o", tmp_path / "kernels.o"])
    assert not re.search(r"csrc/.*warning|warning.*csrc/", output), output
    frames = re.findall(r"Function properties for (\S*mergecore4cuda\S*)\n\s*(\d+) bytes stack frame", output)
    ours = [(name, int(stack)) for name, stack in frames if "3cub" not in name]
    assert ours
    assert [name for name, stack in ours if stack > 0] == []


def test_cuda_ops_cpp_is_valid() -> None:
    from torch.utils.cpp_extension import include_paths

    macros = ["-DUSE_CUDA=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    output = run([COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", *macros, *includes, ROOT / "csrc" / "cuda_ops.cpp"])
    assert "warning" not in output
