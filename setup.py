"""Builds the C++ and CUDA operators on libtorch's stable ABI, beside a CPU torch as well as a CUDA one.

    medusa_kernels/_ops_cpu.so      schemas and CPU kernels            (torch and a C++ compiler)
    medusa_kernels/_ops_cuda.so     CUDA kernels                       (and nvcc)
    medusa_kernels/_fast_calls.so   calls made again, without PyTorch's C++ (Python's headers)
    medusa_kernels/_build_info.*    what the others were built with    (pybind11, whose headers torch brings)

MEDUSA_KERNELS_BUILD        auto (default): what can be built here; cpu, cuda: that or an error; none: pure Python
MEDUSA_KERNELS_CUDA_ARCHS   "80;90;100" (default): machine code for each, and PTX for the last
CUDA_HOME, CXX              where nvcc is (default: on the PATH), the C++ compiler (default: g++)
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
CPP_SOURCES = ["ops.cpp", "kv_cache_cpu.cpp", "acceptance_cpu.cpp", "finish_step_cpu.cpp"]
CUDA_SOURCES = ["kv_cache.cu", "acceptance.cu", "finish_step.cu"]
TORCH_TARGET = "2.11"  # one binary serves this and every later torch

MODE = os.environ.get("MEDUSA_KERNELS_BUILD", "auto")
ARCHS = [a for a in os.environ.get("MEDUSA_KERNELS_CUDA_ARCHS", "80;90;100").split(";") if a]
CXX = os.environ.get("CXX", "g++")
if any(a.startswith("90") for a in ARCHS):  # Hopper alone has its instructions
    CUDA_SOURCES.append("tree_attention_sm90.cu")


def find_torch() -> Path | None:
    """The installed torch, if it is one that these sources can be built against."""
    try:
        import torch
    except ImportError:
        return None
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < tuple(int(n) for n in TORCH_TARGET.split(".")):
        return None
    return Path(torch.__file__).parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def plan() -> tuple[Path | None, str | None]:
    """(torch, nvcc) to build with; None: not that part."""
    if MODE not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"MEDUSA_KERNELS_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")
    if not ARCHS or not all(re.fullmatch(r"\d+[af]?", a) for a in ARCHS):
        sys.exit(f"MEDUSA_KERNELS_CUDA_ARCHS: expected a list such as 80;90;100, got {ARCHS}")
    if MODE == "none":
        return None, None
    torch, nvcc = find_torch(), find_nvcc()
    if torch is None and MODE != "auto":
        sys.exit(
            f"MEDUSA_KERNELS_BUILD={MODE}: needs torch>={TORCH_TARGET} in the Python that builds; with pip, install "
            "torch first and give --no-build-isolation"
        )
    if nvcc is None and MODE == "cuda":
        sys.exit("MEDUSA_KERNELS_BUILD=cuda: no nvcc in CUDA_HOME/bin nor on the PATH")
    if torch is None:
        warn(f"no torch>={TORCH_TARGET} in the building Python: a pure Python package, without compiled operators")
    elif nvcc is None and MODE == "auto":
        warn("no nvcc in CUDA_HOME/bin nor on the PATH: without the CUDA operators")
    return torch, nvcc if torch and MODE != "cpu" else None


def warn(text: str) -> None:
    print(f"medusa_kernels: warning: {text}", file=sys.stderr)


class NinjaBuild(build_ext):
    """Compiles every changed file at once, through ninja where there is one; keeps ptxas' report in build/ptxas.log."""

    def get_ext_filename(self, fullname):
        name = fullname.split(".")[-1]
        if name.startswith("_ops_"):  # no Python in them: loaded by torch
            return fullname.replace(".", os.sep) + ".so"
        if name == "_fast_calls":  # for every version of Python
            return fullname.replace(".", os.sep) + ".abi3.so"
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        BUILD.mkdir(exist_ok=True)
        steps: list[tuple[Path, list[Path], list[str]]] = []  # output, inputs, command
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            compilers = {
                "_ops_cpu": cpp_command, "_ops_cuda": cuda_command, "_fast_calls": python_command,
                "_build_info": build_info_command,
            }  # fmt: skip
            link_flags = {"_ops_cpu": torch_libs, "_ops_cuda": cuda_libs, "_fast_calls": list, "_build_info": list}
            kind = ext.name.split(".")[-1]
            objects = []
            for source in map(Path, ext.sources):
                objects.append(BUILD / "obj" / f"{source.name}.o")
                steps.append((objects[-1], [source.resolve()], compilers[kind](source.resolve(), objects[-1])))
            # Linked in build/, then copied: pip gives a new output folder each time.
            library = BUILD / "linked" / output.name
            link = [CXX, "-shared", *map(str, objects), "-o", str(library), *link_flags[kind]()]
            steps.append((library, objects, link))
        with (BUILD / "lock").open("w") as lock:  # `make test` beside `make demo`
            fcntl.flock(lock, fcntl.LOCK_EX)
            run(steps)
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name)).resolve()
            shutil.copyfile(BUILD / "linked" / output.name, output)
        logs = [BUILD / "obj" / f"{source}.o.log" for source in CUDA_SOURCES] if NVCC else []
        (BUILD / "ptxas.log").write_text("".join(log.read_text() for log in logs))


def cpp_command(source: Path, output: Path) -> list[str]:
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    return [CXX, *flags, *torch_includes(), *compile_to(source, output)]


def cuda_command(source: Path, output: Path) -> list[str]:
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    code.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
    if source.stem.endswith("_sm90"):
        code = ["-gencode=arch=compute_90a,code=sm_90a"]
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-lineinfo", "--threads", "2", "-Xptxas", "-v"]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return [NVCC, *flags, *host, *code, *torch_includes(), *compile_to(source, output)]


def build_info_command(source: Path, output: Path) -> list[str]:
    import torch

    nvcc_version = ""
    if NVCC:
        text = subprocess.run([NVCC, "--version"], check=True, capture_output=True, text=True).stdout
        nvcc_version = re.search(r"V(\d[\d.]*)", text)[1]
    defines = {
        "MK_TORCH_TARGET": TORCH_TARGET,
        "MK_TORCH_VERSION": torch.__version__,
        "MK_NVCC_VERSION": nvcc_version,
        "MK_CUDA_ARCHS": ";".join(ARCHS) if NVCC else "",
    }
    return python_command(source, output, *(f'-D{k}="{v}"' for k, v in defines.items()))


def python_command(source: Path, output: Path, *defines: str) -> list[str]:
    flags = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *defines]
    includes = ["-isystem", str(TORCH / "include"), "-isystem", sysconfig.get_path("include")]
    return [CXX, *flags, *includes, *compile_to(source, output)]


def compile_to(source: Path, output: Path) -> list[str]:
    return ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]  # the headers it read, for ninja


def torch_includes() -> list[str]:
    major, minor = TORCH_TARGET.split(".")
    target = f"-DTORCH_TARGET_VERSION=0x{int(major):02x}{int(minor):02x}000000000000"
    return ["-isystem", str(TORCH / "include"), f"-I{ROOT / 'csrc'}", target]


def torch_libs() -> list[str]:
    # libtorch.so itself: on a CUDA torch it is what pulls in libtorch_cuda.
    return [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]


def cuda_libs() -> list[str]:
    # nvcc may be a wrapper script anywhere: ask it where its libraries are.
    dry = subprocess.run([NVCC, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    folders = [f for f in re.findall(r'-L"?([^"\s]+)', dry) if not f.endswith("/stubs")]
    return [*(f"-L{f}" for f in folders), "-lcudart_static", "-ldl", "-lrt", "-lpthread", *torch_libs()]


def run(steps: list[tuple[Path, list[Path], list[str]]]) -> None:
    for output, _, _ in steps:
        output.parent.mkdir(parents=True, exist_ok=True)
    shell = {}  # what a command prints is kept beside its output
    for output, _, command in steps:
        log = shlex.quote(f"{output}.log")
        shell[output] = f"{shlex.join(command)} > {log} 2>&1 || {{ cat {log}; exit 1; }}"
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        outputs = sorted(shell, key=lambda output: output.suffix != ".o")  # objects before libraries
        objects = sum(output.suffix == ".o" for output in outputs)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            codes = list(
                pool.map(lambda output: subprocess.run(shell[output], shell=True).returncode, outputs[:objects])
            )
        if any(codes) or any(subprocess.run(shell[output], shell=True).returncode for output in outputs[objects:]):
            sys.exit("medusa_kernels: the build failed, see above")
        return
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    lines = [f"builddir = {escape(BUILD)}", "rule run", "  command = $cmd", "  description = $out"]
    for output, inputs, _ in steps:
        lines.append(f"build {escape(output)}: run {' '.join(map(escape, inputs))}")
        if output.suffix == ".o":
            lines += ["  deps = gcc", f"  depfile = {escape(output)}.d"]
        lines.append(f"  cmd = {shell[output].replace('$', '$$')}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs_flag = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run([ninja, "-f", str(BUILD / "build.ninja"), *jobs_flag]).returncode:
        sys.exit("medusa_kernels: the build failed, see above")


def extension(name: str, sources: list[str]) -> Extension:
    headers = [str(h.relative_to(ROOT)) for h in sorted((ROOT / "csrc").glob("*.h"))]
    return Extension(f"medusa_kernels.{name}", [f"csrc/{s}" for s in sources], depends=headers)


TORCH, NVCC = plan()
EXTENSIONS = []
if TORCH:
    EXTENSIONS += [extension("_ops_cpu", CPP_SOURCES), extension("_fast_calls", ["fast_calls.cpp"])]
    EXTENSIONS += [extension("_build_info", ["build_info.cpp"])]
if NVCC:
    EXTENSIONS += [extension("_ops_cuda", CUDA_SOURCES)]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": NinjaBuild})
