"""The Triton kernels compile ahead of time for sm_80, sm_90 and sm_100, fit a block's shared memory and do not spill.

Runs without a GPU; in a process of its own, as the interpreter must be off.
"""

import math
import os
import re
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import triton

from medusa_kernels import TokenTree, _sm90, attention
from medusa_kernels._calls import new_calls
from medusa_kernels._triton import tree_attention as kernels
from medusa_kernels._triton import tree_attention_invariant as invariant

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles for real: run with TRITON_INTERPRET=0", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may opt in to
SMS = {80: 108, 90: 132, 100: 148}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = {
    "mask_ptr": "i64", "depths_ptr": "i32", "num_nodes_ptr": "i32", "cache_seqlens_ptr": "i32",
    "block_table_ptr": "i32", "sinks_ptr": "fp32", "k_scale_ptr": "fp32", "v_scale_ptr": "fp32", "lse_ptr": "fp32",
    "partial_ptr": "fp32", "partial_lse_ptr": "fp32", "acc_ptr": "fp32", "m_ptr": "fp32", "norm_ptr": "fp32",
}  # fmt: skip

# (nodes, group, batch * KV heads, slots, head dim): the shapes of Vicuna-7B, Llama-3, Llama-3-70B, SmolLM2 and others
SHAPES = [
    (1, 4, 8, 4096, 128), (64, 1, 32, 4096, 128), (64, 4, 8, 8192, 128), (64, 4, 64, 4096, 128), (64, 3, 3, 1024, 64),
    (64, 7, 4, 4096, 128), (26, 1, 32, 2048, 80), (64, 4, 8, 4096, 96), (64, 2, 8, 4096, 256),
]  # fmt: skip
ALL = {"BLOCK_SIZE", "APPEND", "HAS_NUM_NODES", "HAS_WINDOW", "SOFTCAP", "HAS_SINKS", "HAS_LSE"}
USUAL = {"BLOCK_SIZE", "APPEND", "HAS_NUM_NODES"}
VARIANTS = [
    *((shape, "bf16", "bf16", USUAL) for shape in SHAPES),
    *((SHAPES[i], "bf16", "bf16", set()) for i in (1, 2, 3)),
    (SHAPES[2], "fp16", "fp16", set()),
    *((SHAPES[i], "bf16", "bf16", ALL) for i in (1, 2)),
    *((SHAPES[i], "bf16", "fp8e4nv", {"HAS_SCALES", "APPEND"}) for i in (1, 2)),
    *((SHAPES[1], "fp32", "fp32", flags) for flags in ({"APPEND"}, {"SOFTCAP"})),
]
NEEDS = {
    "APPEND": ("new_k_ptr", "new_v_ptr"), "HAS_WINDOW": ("depths_ptr",), "HAS_NUM_NODES": ("num_nodes_ptr",),
    "BLOCK_SIZE": ("block_table_ptr",), "HAS_SINKS": ("sinks_ptr",), "HAS_SCALES": ("k_scale_ptr", "v_scale_ptr"),
    "HAS_LSE": ("lse_ptr",),
}  # fmt: skip

# Bytes of stack: a scalar or two that outlive the loops are no spill of a tile. More is accepted where all options come
# together without wgmma, and for fp32, which exists to compare texts.
STACK = 16
SPILLS = {(80, "all"): 96, (80, "fp32"): 256, (90, "fp32"): 256, (100, "fp32"): 256}


def with_values(flags):
    """Constants of a kernel with these options: caches are in blocks of 16, or contiguous."""
    return {name: name in flags for name in ALL | {"HAS_SCALES"}} | {"BLOCK_SIZE": 16 * ("BLOCK_SIZE" in flags)}


def specialise(kernel, constants, pointers):
    """Signature and attributes of a usual launch: pointers and strides divisible by 16."""
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*" + pointers[name] if name in pointers else "i32"
        if name in ("qk_scale", "softcap"):
            signature[name] = "fp32"
        if name in pointers or re.match(r"stride_(q|k|v|nk|nv|o)", name):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, attrs


def compile_for(arch, kernel, constants, pointers, absent, **options):
    constants = {**constants, **dict.fromkeys(absent)}
    signature, attrs = specialise(kernel, constants, pointers)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(compiled, arch, allowed_stack):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    regs, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    print(f"sm_{arch}: {regs} registers, {stack} B stack, {compiled.metadata.shared} B shared")
    assert compiled.metadata.shared <= SHARED[arch]
    assert stack <= allowed_stack
    assert getattr(compiled.metadata, "tmem_size", 0) <= 512


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "shape, dtype, cache, flags", VARIANTS, ids=lambda x: "-".join(map(str, sorted(x) if isinstance(x, set) else x))
    if isinstance(x, (set, tuple)) else None,
)  # fmt: skip
def test_compiles(arch, shape, dtype, cache, flags):
    if cache == "fp8e4nv" and arch == 80:
        with pytest.raises(Exception, match="fp8e4nv"):
            build(arch, shape, dtype, cache, flags)
        return
    attention, merge = build(arch, shape, dtype, cache, flags)
    check(attention, arch, SPILLS.get((arch, "all" if flags == ALL else dtype), STACK))
    if merge is not None:
        check(merge, arch, STACK)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "shape, dtype, cache, flags",
    [
        (SHAPES[1], "bf16", "bf16", USUAL), (SHAPES[2], "fp16", "fp16", set()), (SHAPES[2], "bf16", "bf16", ALL),
        (SHAPES[4], "bf16", "bf16", USUAL), (SHAPES[6], "bf16", "bf16", USUAL), (SHAPES[8], "bf16", "bf16", USUAL),
        (SHAPES[2], "bf16", "fp8e4nv", {"HAS_SCALES", "APPEND"}), (SHAPES[1], "fp32", "fp32", {"APPEND"}),
        (SHAPES[1], "fp32", "fp32", {"SOFTCAP"}),
    ],
    ids=lambda x: "-".join(map(str, sorted(x) if isinstance(x, set) else x)) if isinstance(x, (set, tuple)) else None,
)  # fmt: skip
def test_invariant_compiles(arch, shape, dtype, cache, flags):
    if cache == "fp8e4nv" and arch == 80:
        pytest.skip("no e4m3 in sm_80's Triton")
    _, group, _, _, head_dim = shape
    config = invariant.tile_config(head_dim, DTYPES[dtype], arch)
    constants = with_values(flags) | {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "TILES": invariant.CHUNK // config.block_n, "UPCAST": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    pointers = {**POINTERS, **dict.fromkeys(("q_ptr", "new_k_ptr", "new_v_ptr", "out_ptr"), dtype)}
    pointers |= {"k_ptr": cache, "v_ptr": cache}
    absent = [p for flag, names in NEEDS.items() if flag not in flags for p in names]
    arithmetic = []
    for kernel in (invariant.prefix_kernel, invariant.tail_kernel):
        names = kernel.arg_names
        compiled = compile_for(
            arch, kernel, {k: v for k, v in constants.items() if k in names}, pointers,
            [p for p in absent if p in names],
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        check(compiled, arch, 64 if (arch, head_dim) == (90, 256) else STACK)
        instructions = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", compiled.asm["ptx"])
        ttgir = compiled.asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#.*?)(?: loc.*)?$", ttgir, re.M))
        reduced = re.findall(r"\}\) : \(tensor<(\w+)xf32, (#\w+)>\) ->", ttgir)
        arithmetic.append((set(instructions), {(shape, layouts[name]) for shape, name in reduced}))
        if kernel is invariant.prefix_kernel:  # the other has some in its logarithm
            assert "fma.rn.f32" not in compiled.asm["ptx"]
    # What the bits rest on: the same matmuls and the same order within a row's sum, in both kernels.
    assert arithmetic[0] == arithmetic[1] and all(arithmetic[0])


def build(arch, shape, dtype, cache, flags):
    nodes, group, heads, slots, head_dim = shape
    config = kernels.tile_config(nodes * group, head_dim, heads, slots, DTYPES[dtype], SMS[arch], arch)
    split = config.num_splits > 1
    constants = with_values(flags) | {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "SPLIT": split, "UPCAST": False,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    pointers = {**POINTERS, **dict.fromkeys(("q_ptr", "new_k_ptr", "new_v_ptr", "out_ptr"), dtype)}
    pointers |= {"k_ptr": cache, "v_ptr": cache}
    absent = [p for flag, names in NEEDS.items() if flag not in flags for p in names]
    if not split:
        absent += ["partial_ptr", "partial_lse_ptr"]
    attention = compile_for(
        arch, kernels.tree_attention_kernel, constants, pointers, absent,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    merge = None
    if split:
        kept = {k: v for k, v in constants.items() if k in kernels.merge_kernel.arg_names}
        kept |= {"BLOCK_R": kernels.MERGE_ROWS, "SPLITS": min(8, triton.next_power_of_2(config.num_splits))}
        absent = [p for p in absent if p in kernels.merge_kernel.arg_names]
        merge = compile_for(arch, kernels.merge_kernel, kept, pointers, absent, num_warps=4)
    return attention, merge


class _Launches:
    """In place of a GPU: Triton's driver, that compiles for sm_90 and keeps what it is asked to launch."""

    class Utils:
        def load_binary(self, name, kernel, shared, device):
            return None, (name, kernel), 0, 0, 1024

        def get_device_properties(self, device):
            return {"max_shared_mem": SHARED[90]}

    def __init__(self):
        self.utils, self.made = self.Utils(), []

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        kinds = list(source.signature.values())

        def run(x, y, z, stream, function, packed, launch_metadata, on_enter, on_exit, *args):
            assert len(args) == len(kinds)
            values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
            # A constant is in the code: what is passed for it is never looked at.
            values = [None if kind == "constexpr" else value for kind, value in zip(kinds, values)]
            pointers = [isinstance(kind, str) and kind[0] == "*" for kind in kinds]
            self.made.append(((x, y, z), stream, function, packed, values, pointers))

        return run


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime import driver

    fake = _Launches()
    monkeypatch.setattr(driver, "_active", fake)
    used = [kernels.tree_attention_kernel, kernels.merge_kernel, invariant.prefix_kernel, invariant.tail_kernel]
    for kernel in used:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(attention, "_sms_and_arch", lambda device: (132, 90))
    monkeypatch.setattr(_sm90, "_kernel", lambda: None)  # which a PyTorch with CUDA would load
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(attention, "_known", new_calls())
    return fake.made


def operator_arguments(
    shift=0, heads_kv=4, heads=16, size=16, strided=False, same_cache=False, dtype=torch.bfloat16, append=True,
    slots=2048, window=0, scale=0.125, batch_invariant=False, lse=False, block_size=0,
):  # fmt: skip
    def tensor(*shape):  # `shift` elements into its storage
        return torch.zeros(math.prod(shape) + shift, dtype=dtype)[shift:].view(shape)

    shape = (slots // block_size * 2, block_size, heads_kv, 128) if block_size else (2, slots, heads_kv, 128)
    k_cache = tensor(shape[0], heads_kv, shape[1], 128).transpose(1, 2) if strided else tensor(*shape)
    v_cache = k_cache if same_cache else torch.empty_strided(shape, k_cache.stride(), dtype=dtype)
    if shift:
        v_cache = tensor(*shape)
    new = [tensor(2, size, heads_kv, 128) for _ in range(2)] if append else [None, None]
    tree = TokenTree.chain(size - 1)
    table = torch.zeros(2, slots // block_size, dtype=torch.int32) if block_size else None
    return (
        tensor(2, size, heads, 128), k_cache, v_cache, *new, tree.packed_mask, tree.depths if window else None, None,
        torch.tensor([300, 7], dtype=torch.int32), table, None, None, None, scale, window, 0.0, batch_invariant,
        tensor(2, size, heads, 128), torch.zeros(2, heads, size) if lse else None,
    )  # fmt: skip


def test_replayed_launches_are_tritons_own(launches, monkeypatch):
    """Calls alike in all but what Triton compiles for: a launch made again is the one that Triton would have made."""

    def comparable(made, arguments):
        known = {x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)}
        result = []
        work = None  # room allocated anew each time: only distances within it can be compared
        for *launch, values, pointers in made:
            for i, (value, pointer) in enumerate(zip(values, pointers)):
                if pointer and value is not None and value not in known:
                    work = value if work is None else work
                    values[i] = ("work", value - work)
            result.append((*launch, values))
        made.clear()
        return result

    variants = [
        {}, {"same_cache": True}, {}, {"shift": 4}, {"shift": 1}, {"strided": True}, {"size": 1}, {"size": 17},
        {"heads_kv": 1}, {"heads_kv": 16}, {"dtype": torch.float16}, {"window": 100}, {"window": 112}, {"scale": 0.5},
        {"append": False}, {"lse": True}, {"block_size": 16}, {"block_size": 1}, {"batch_invariant": True},
        {"batch_invariant": True, "shift": 4}, {"slots": 64}, {"size": 64, "heads": 32, "heads_kv": 8},
    ]  # fmt: skip
    for options in variants:  # remembered one beside the other
        attention._launch(*operator_arguments(**options))
        launches.clear()
    functions = set()
    for options in variants:
        arguments = operator_arguments(**options)
        remembered = attention._known.values()
        attention._launch(*arguments)
        assert attention._known.values() == remembered, f"{options}: not made again, but anew"
        again = comparable(launches, arguments)
        with monkeypatch.context() as nothing_known:
            nothing_known.setattr(attention, "_calls", new_calls())
            attention._launch(*arguments)
        assert again == comparable(launches, arguments) and again, options
        functions.add(again[0][2])
    assert len(functions) > 10  # variants in which Triton does compile something else


def test_replay_gives_way_to_hooks_and_settings(launches):
    arguments = operator_arguments()
    attention._launch(*arguments)
    (again,) = attention._known.values()
    tensors = operator_arguments()[:13] + arguments[-2:]
    assert again([0 if x is None else x.data_ptr() for x in tensors])
    launches.clear()
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert not again([])
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = True
        assert not again([])
    assert not launches
