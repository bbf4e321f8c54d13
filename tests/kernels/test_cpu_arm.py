"""The kernels for 64-bit Arm, cross-compiled and run under an emulator against plain C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-static", "-pthread", "-DMOTLEY_NEON"]
SETS = {"generic": [], "neon": [], "dotprod": ["-march=armv8.2-a+dotprod"]}

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The test program, with the kernels of every Arm instruction set."""
    folder = tmp_path_factory.mktemp("arm")
    sources = ROOT / "kernels" / "cpu"
    objects = [folder / f"{name}.o" for name in SETS]
    for (name, flags), out in zip(SETS.items(), objects, strict=True):
        source = sources / "kernels.cpp"
        compile_with(*flags, f"-DISA={name}", "-c", str(source), "-o", str(out))
    rest = [
        sources / "pool.cpp",
        sources / "pack.cpp",
        Path(__file__).with_name("compare_sets.cpp"),
    ]
    compile_with(f"-I{sources}", *map(str, rest + objects), "-o", str(folder / "compare"))
    return folder / "compare"


def compile_with(*arguments):
    subprocess.run([COMPILER, *FLAGS, *arguments], check=True, timeout=100)


@pytest.mark.parametrize("name", ["neon", "dotprod"])
def test_arm_computes_what_plain_cpp_does(program, name):
    command = [EMULATOR, "-cpu", "max", str(program), "generic", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    errors = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(errors) == 11
    for operation, error in errors.items():
        rounds = operation in ("norm", "silu", "attention int8")
        assert float(error) < (1 / 127 if rounds else 1e-4), operation


def test_a_processor_without_dot_products_is_not_given_them(program):
    command = [EMULATOR, "-cpu", "cortex-a53", str(program), "generic", "dotprod"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "neon generic" in done.stderr
    assert "dotprod" not in done.stderr
