"""The engines of bf16 as a program of their own: under sanitizers, with narrower vectors, and for Arm on an emulated processor."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mue.kernels import build

SOURCES = [
    Path(build.__file__).parent / "csrc" / name for name in build.SOURCES if name not in ("norm.cpp", "route.cpp")
]
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INSTRUCTIONS = build.INSTRUCTIONS.get(build._instructions(), ())


def engines(folder: Path, compiler: str, options: tuple[str, ...], runner: tuple[str, ...] = ()) -> set[str]:
    """Builds engines.cpp and runs it, which fails where one is wrong; the names of those that ran."""
    program = folder / "engines"
    here = Path(__file__).with_name("engines.cpp")
    plain = [option for option in build.OPTIONS if option != "-fPIC"]
    command = [
        compiler,
        *plain,
        *options,
        "-I",
        str(SOURCES[0].parent),
        *map(str, (here, *SOURCES)),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=600)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return {re.split(r" d\d", line)[0] for line in done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Every engine that this processor has, and the tile model, with addresses and undefined behaviour watched."""
    watched = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", *INSTRUCTIONS)
    found = engines(tmp_path, build.compiler() or "", watched)
    assert "plain" in found and ("tile model" in found) == (build._instructions() == "AVX512")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which(EMULATOR)), reason=f"no {ARM} or {EMULATOR}")
@pytest.mark.parametrize(
    ("processor", "expected"), [("max", {"plain", "dot products", "sublayers"}), ("cortex-a72", {"plain"})]
)
def test_arm_with_and_without_bf16_instructions(tmp_path: Path, processor: str, expected: set[str]) -> None:
    assert engines(tmp_path, ARM, ("-static",), (EMULATOR, "-cpu", processor)) == expected
