"""Builds the native parts: the torch extension with the kernels, and the pybind11 stream module.

The kernels use LibTorch's stable ABI, so one build serves every torch from 2.10 on. CUDA kernels are
built when torch was built with CUDA and a CUDA toolkit is found (CUDA_HOME).
"""

import glob
import os
import platform
import shutil
import sys

from setuptools import setup


def fail(message):
    sys.exit(f"mergecore: {message}")


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    fail("building needs torch: run `make setup`, or install torch first and use --no-build-isolation")
try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:
    fail("building needs pybind11: run `make setup`, or `pip install pybind11 ninja` first")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    fail(f"torch {torch.__version__} is too old: the kernels need torch 2.10 or later")
compiler = os.environ.get("CXX", "c++")
if shutil.which(compiler.split()[0]) is None:
    fail(f"no C++ compiler: {compiler!r} was not found; install g++ (Debian: apt-get install g++) or set CXX")

# Exact arithmetic in the order written; the two flags that are off change no value, they only let
# loops with comparisons and fma() be vectorised.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Loops that fill a hundred bytes stay loops: as a call or as `rep stos` they take as long as what follows.
FILL = "-fno-tree-loop-distribute-patterns"
HOST = ["-O3", "-std=c++17", "-g1", "-fvisibility=hidden", "-Wall", "-Wextra", FILL, *ARITHMETIC]
if platform.machine() in ("x86_64", "AMD64"):
    HOST.append("-mprefer-vector-width=512")
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020a000000000000")]

with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and os.environ.get("MERGECORE_CUDA") != "0"
sources = ["csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
if with_cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    kernels = CUDAExtension(
        "mergecore._kernels",
        [*sources, "csrc/cuda_ops.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
        define_macros=[*STABLE_ABI, ("USE_CUDA", "1")],
        extra_compile_args={
            "cxx": HOST,
            "nvcc": ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-ffp-contract=off", "-lineinfo"],
        },
        py_limited_api=True,
    )
else:
    kernels = CppExtension(
        "mergecore._kernels",
        sources,
        define_macros=STABLE_ABI,
        extra_compile_args={"cxx": HOST},
        py_limited_api=True,
    )
stream = Pybind11Extension("mergecore._stream", ["csrc/stream.cpp"], cxx_std=17)
stream.extra_compile_args += ["-O2", "-g1", "-Wall", "-Wextra"]

setup(
    ext_modules=[kernels, stream],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
