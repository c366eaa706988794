"""CUDA kernels without a GPU: their source, compiled as C++ and run thread by thread in random order
(cuda_on_cpu/cuda_on_cpu.h), gives what the serial C++ code gives, bit for bit.

It sees wrong arithmetic, wrong or misaligned addresses, missing barriers, and accesses to blocks that have not begun;
not the memory model, nor what nvcc makes of the source.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests/cuda_on_cpu"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run_kernel(name: str, folder: Path, rounds: int, *flags: str) -> subprocess.CompletedProcess:
    """Compiles cuda_on_cpu/<name>.cpp with the kernel in `folder` if there is one, else with csrc's, and runs it."""
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", *flags)
    # Without the functions of torch's headers that nothing calls: they want its library.
    flags += ("-ffunction-sections", "-Wl,--gc-sections")
    includes = [f"-I{path}" for path in (folder, ROOT / "csrc", SOURCES)]
    includes += ["-isystem", Path(torch.__file__).parent / "include"]
    command = ["g++", *flags, *includes, SOURCES / f"{name}.cpp", "-o", folder / name]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([folder / name, str(rounds)], capture_output=True, text=True, timeout=300)


# Rounds, and what the program says at the end, when it has also seen that its cases cover the kernel's paths.
RUNS = {
    "acceptance": (3, r"132 cases: \d+ with long paths"),
    "kv_cache": (150, r"150 cases: \d+ moves"),
    "finish_step": (500, r"500 cases: rows \d+ wide"),
}


@pytest.mark.parametrize("kernel", RUNS)
def test_the_cuda_kernel_equals_the_serial_one(kernel, tmp_path):
    rounds, says = RUNS[kernel]
    done = run_kernel(kernel, tmp_path, rounds, "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(says, done.stdout), done.stdout


MUTATIONS = {
    # A barrier between a reduction's two halves; the wait for all blocks of a cluster; the arithmetic of typical
    # acceptance's shortcut, which the exact entropy must overrule near the bound; the wait for what others send.
    "acceptance": {
        "barrier": (
            "            Cluster::wait(&s.came[turn()], exchanges / 2 % 2);\n        } else {",
            "        } else {",
        ),
        "cluster": ("        Cluster::started();", ""),
        "bound": ("if (__syncthreads_or(open))", "if (__syncthreads_or(exact))"),
        "mail": ("while (static_cast<uint32_t>(word) == 0 || (two && word >> 32 == 0))", "while (false)"),
    },
    # The barrier between planning the moves and making them; the wait for all blocks of a request before its length
    # is written; entries of the path that do not count, whose slots are not the tree's.
    "kv_cache": {
        "barrier": ("    __syncthreads();\n", ""),
        "arrival": ("gridDim.x)", "1)"),
        "slot": ("i < kept ? node : -1", "node"),
    },
    # The barrier before a request's state is written; the row of the wrong node.
    "finish_step": {
        "barrier": ("    __syncthreads();  // every thread has read what is written now\n", ""),
        "row": ("a.last_node[b] * a.hidden_stride_t", "a.accept_length[b] * a.hidden_stride_t"),
    },
}


@pytest.mark.parametrize("kernel, name", [(kernel, name) for kernel in MUTATIONS for name in MUTATIONS[kernel]])
def test_a_broken_kernel_is_found(kernel, name, tmp_path):
    old, new = MUTATIONS[kernel][name]
    header = ROOT / f"csrc/{kernel}_kernel.h"
    text = header.read_text()
    assert text.count(old) == 1
    (tmp_path / header.name).write_text(text.replace(old, new))
    done = run_kernel(kernel, tmp_path, 2 * RUNS[kernel][0], "-O0")  # soon found: compiling takes longer
    assert done.returncode != 0, done.stdout
