"""What was built, how setup.py decides, and what the compilers said."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medusa_kernels import _ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medusa_kernels"
OPERATORS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
CUDA_BUILT = (PACKAGE / "_ops_cuda.so").exists()


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MEDUSA_KERNELS")}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=300
    )


def test_operators_are_built():
    assert "compact_kv_cache" in OPERATORS
    assert _ops.HAS_CPU_OPS, _ops._load_errors
    if os.environ.get("MEDUSA_KERNELS_BUILD") == "cuda":
        assert CUDA_BUILT
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"medusa_kernels::{name}", "CPU"), name
        if name.endswith("_plan"):  # which nothing that traces calls
            assert _ops.function(name.removesuffix("_plan"), False)
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"medusa_kernels::{name}", "Meta"), f"{name}: no fake"


@pytest.mark.skipif(not CUDA_BUILT, reason="built without nvcc")
def test_every_operator_has_a_cuda_kernel():
    # Beside a CPU torch some symbols of the library have no definition: bound lazily, it loads all the same.
    code = f"""
import ctypes, os, torch
torch.ops.load_library({str(PACKAGE / "_ops_cpu.so")!r})
library = ctypes.CDLL({str(PACKAGE / "_ops_cuda.so")!r}, mode=os.RTLD_LAZY)
for name in {OPERATORS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("medusa_kernels::" + name, "CUDA"), name
    assert not name.endswith("_plan") or library["medusa_kernels_" + name.removesuffix("_plan")], name
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not CUDA_BUILT, reason="built without nvcc")
def test_no_kernel_spills():
    log = (ROOT / "build/ptxas.log").read_text()
    assert f"sm_{_ops.build_info()['cuda_archs'][0]}" in log
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
    kernels = re.findall(pattern, log, re.DOTALL)
    assert len(kernels) >= len(OPERATORS) * len(_ops.build_info()["cuda_archs"])
    # accept_kernel's many paths share 64 registers a thread, and leave some scalars on the stack, most on sm_80.
    # Hopper's attention to an fp8 cache has 512 threads and leaves some there, outside its main loop.
    limits = {
        ("accept_kernel", "sm_80"): 80,
        ("accept_kernel", "sm_"): 32,
        ("ELb1ELb0EEEEEv14CUtensorMap", "sm_90a"): 80,
    }

    def allowed(name: str, arch: str) -> int:
        return next((n for (part, of), n in limits.items() if part in name and of in arch), 0)

    spills = [
        f"{name} for {arch}: {stores} B" for name, arch, _, stores in kernels if int(stores) > allowed(name, arch)
    ]
    assert not spills, "\n".join(spills)


@pytest.fixture(scope="module")
def hopper_kernels() -> dict[str, str]:
    """The machine code of each, by name."""
    if not CUDA_BUILT or "90" not in _ops.build_info()["cuda_archs"]:
        pytest.skip("built without nvcc or sm_90")
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = run(cuobjdump, "-arch", "sm_90", "-sass", PACKAGE / "_ops_cuda.so").stdout
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|$)", text, re.DOTALL))


def test_parameters_are_loaded_before_the_wait(hopper_kernels):
    """On Hopper, while the kernel before ends (csrc/early_launch.h): assemblers leave out loads that nothing uses."""
    seen = set()
    for name, code in hopper_kernels.items():
        kernel = next((k for k in ("tree_attention_kernel", "accept_kernel", "compact_kernel") if k in name), None)
        if kernel is None:
            continue
        before = code.partition(" ACQBULK ")[0]
        assert before != code and "NANOSLEEP" in before, name
        assert re.search(r"LDC[.\w]* R\d+, c\[0x0\]\[R\d+", before), name
        seen.add(kernel)
    assert len(seen) == 3


def test_attention_of_one_warpgroup_stays_cached(hopper_kernels):
    """Short calls and plain decoding: a multiprocessor's 128 KB of instructions must have room for a decoder's matmuls
    beside it, or it comes from memory in every layer (benchmarks/LOG.md, entry 44)."""
    sizes = {
        name: max(int(address, 16) for address in re.findall(r"/\*([0-9a-f]{4,6})\*/", code)) + 16
        for name, code in hopper_kernels.items()
        if re.search(r"tree_attention_kernel.*Li1ELb0E", name)  # one group of 64 rows, no fp8
    }
    assert len(sizes) == 8  # bfloat16 and fp16, head dims of 64 and 128, splits that merge in a cluster or not
    assert all(0 < size < 60 * 1024 for size in sizes.values()), sizes


def test_build_info():
    info = _ops.build_info()
    assert info["torch"] == torch.__version__ and info["cpu_ops"] is True
    assert info["cuda_ops"] is (CUDA_BUILT and torch.version.cuda is not None)
    assert info["torch_target"] == "2.11" and info["built_with_torch"]
    assert info["cxx"].split()[0] in ("gcc", "clang")
    if CUDA_BUILT:
        assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"]) and info["cuda_archs"]


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "_ops_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(_ops, "_HERE", tmp_path)
    monkeypatch.setattr(_ops, "_load_errors", {})
    monkeypatch.setattr(_ops, "HAS_CUDA_OPS", _ops._load("_ops_cuda"))
    with pytest.raises(RuntimeError, match=r"(?s)_ops_cuda.so: .*(ELF|header|short).*pip install --no-build-isolation"):
        _ops.op("compact_kv_cache", True)


def without_torch(folder: Path) -> str:
    """A PYTHONPATH under which `import torch` fails, as in an isolated build."""
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n")
    return str(folder)


def without_nvcc(folder: Path) -> dict[str, str]:
    """An environment without nvcc, with everything else that the build needs."""
    for tool in ("g++", "ninja", "sh", "cat", "as", "ld"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return {"PATH": str(folder), "CUDA_HOME": ""}


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_mode_without_torch_fails_loudly(mode, tmp_path):
    done = run(sys.executable, "setup.py", "--version", MEDUSA_KERNELS_BUILD=mode, PYTHONPATH=without_torch(tmp_path))
    assert done.returncode != 0 and f"MEDUSA_KERNELS_BUILD={mode}: needs torch>=2.11" in done.stderr


def test_cuda_without_nvcc_fails_loudly(tmp_path):
    done = run(sys.executable, "setup.py", "--version", MEDUSA_KERNELS_BUILD="cuda", **without_nvcc(tmp_path))
    assert done.returncode != 0 and "MEDUSA_KERNELS_BUILD=cuda: no nvcc" in done.stderr


@pytest.mark.parametrize("name, value", [("BUILD", "gpu"), ("CUDA_ARCHS", "hopper"), ("CUDA_ARCHS", "")])
def test_bad_settings_are_named(name, value):
    done = run(sys.executable, "setup.py", "--version", **{f"MEDUSA_KERNELS_{name}": value})
    assert done.returncode != 0 and f"MEDUSA_KERNELS_{name}: expected" in done.stderr


def test_auto_without_nvcc_warns_and_builds_the_rest(tmp_path):
    done = run(sys.executable, "setup.py", "--version", **without_nvcc(tmp_path))
    assert done.returncode == 0 and "without the CUDA operators" in done.stderr


def test_a_pure_package_works_and_says_what_it_lacks(tmp_path):
    (tmp_path / "shadow").mkdir()
    command = ["setup.py", "-q", "build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "site"]
    done = run(sys.executable, *command, PYTHONPATH=without_torch(tmp_path / "shadow"))
    assert done.returncode == 0 and "pure Python package" in done.stderr, done.stderr
    assert not list((tmp_path / "site").rglob("*.so"))
    code = """
import torch
from medusa_kernels import _ops, kv_cache, reference
lengths = torch.tensor([3], dtype=torch.int32)
args = torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), lengths
kv = torch.randn(1, 2, 1, 8, 1, 4)
reference.compact_kv_cache(kv, *args)
assert lengths.item() == 5
info = _ops.build_info()
assert not info["cpu_ops"] and not info["cuda_ops"] and info["built_with_torch"] is None
try:
    kv_cache.compact_kv_cache(kv, *args)
except RuntimeError as error:
    assert "pip install --no-build-isolation" in str(error) and "was not built" in str(error)
    print(_ops.__file__)
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.parametrize("name", ["kv_cache_host", "acceptance_host"])
def test_headers_under_host_sanitizers(name, tmp_path):
    program = tmp_path / name
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    compiled = run("g++", *flags, ROOT / f"tests/{name}.cpp", "-o", program)
    assert compiled.returncode == 0, compiled.stderr
    done = run(program)
    assert done.returncode == 0, done.stdout + done.stderr
