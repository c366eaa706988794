"""The CUDA kernel of accept_candidates without a GPU: its source, compiled as C++ and run thread by thread in random
order (cuda_on_cpu/cuda_on_cpu.h), gives what the serial C++ kernel gives, bit for bit.

Each test compiles (about 5 s) and runs 108 random cases (about 8 s). It sees wrong arithmetic, missing barriers and
accesses to blocks that have not begun; not the memory model, nor what nvcc makes of the source.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL = ROOT / "csrc/acceptance_kernel.h"
SOURCE = ROOT / "tests/cuda_on_cpu/acceptance.cpp"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run_kernel(folder: Path, rounds: int) -> subprocess.CompletedProcess:
    """Compiles with folder/acceptance_kernel.h if there is one, else with csrc's, and runs."""
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc", SOURCE.parent)]
    program = folder / "acceptance"
    compiled = subprocess.run(["g++", *flags, *includes, SOURCE, "-o", program], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([program, str(rounds)], capture_output=True, text=True, timeout=300)


def test_the_cuda_kernel_equals_the_serial_one(tmp_path):
    done = run_kernel(tmp_path, 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"108 cases: \d+ with long paths", done.stdout), done.stdout


# A barrier between a reduction's two halves; the wait for all blocks of a cluster; the arithmetic of typical
# acceptance's shortcut, which the exact entropy must overrule near the bound.
MUTATIONS = {
    "barrier": ("        sync();\n        if (blocks == 1) {", "        if (blocks == 1) {"),
    "cluster": ("        Cluster::started();", ""),
    "bound": ("if (__syncthreads_or(open))", "if (__syncthreads_or(exact))"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_found(tmp_path, name):
    old, new = MUTATIONS[name]
    text = KERNEL.read_text()
    assert text.count(old) == 1
    (tmp_path / KERNEL.name).write_text(text.replace(old, new))
    assert run_kernel(tmp_path, 6).returncode != 0
