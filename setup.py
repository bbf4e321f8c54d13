"""Builds the CPU kernels with the system's C++ compiler; everything else is in pyproject.toml.

One shared library with a plain C interface, its kernels compiled once for each instruction set.
Where there is no compiler the installation still succeeds, and `kernels.dispatch` says so.
"""

from __future__ import annotations

import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cpu")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a tile of rows must round as a single row does
    "-Wall",
    "-Wextra",
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12, of its own AVX-512 header
]
ARM = {"neon": [], "dotprod": ["-march=armv8.2-a+dotprod"]}
INSTRUCTION_SETS = {
    "aarch64": ARM,
    "arm64": ARM,
    "x86_64": {
        "avx512": [
            *("-mavx2", "-mfma", "-mf16c"),
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
        ],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
    },
}


class BuildKernels(build_ext):
    """Compiles the same source once for each instruction set; setuptools has no word for that."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        earlier = Path(self.get_ext_filename(ext.name))  # from an editable build before this one
        newest = max(Path(path).stat().st_mtime for path in ext.depends)
        target.parent.mkdir(parents=True, exist_ok=True)
        if earlier.is_file() and earlier.stat().st_mtime > newest and not self.force:
            if earlier.resolve() != target.resolve():
                shutil.copy2(earlier, target)
            return
        sets = INSTRUCTION_SETS.get(platform.machine(), {})
        jobs = [
            ("kernels.cpp", f"kernels_{name}", [f"-DISA={name}", *flags])
            for name, flags in [*sets.items(), ("generic", [])]
        ]
        defined = [f"-DMOTLEY_{name.upper()}" for name in sets]
        jobs += [(name + ".cpp", name, defined) for name in ("pool", "pack", "kv_codec")]
        compiler = self.compiler.compiler_so_cxx[0]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, flags = job
            output = str(folder / f"{name}.o")
            self.spawn([compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", output])
            return output

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, jobs))
        shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared"]
        self.spawn([compiler, *shared, *objects, "-pthread", "-o", str(target)])


files = [str(path) for path in sorted(SOURCES.glob("*.[ch]*"))]
setup(
    ext_modules=[
        Extension("kernels.cpu.library", sources=[], depends=[*files, __file__], optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
