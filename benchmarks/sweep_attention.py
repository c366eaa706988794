"""How far is tree attention's choice of tiles from the best one? Times a kernel's variants, case by case.

    python benchmarks/sweep_attention.py                         # shapes that the choice was not tuned on
    python benchmarks/sweep_attention.py --cases table --out sweep.json
    python benchmarks/sweep_attention.py --kernel hopper --cases 'nodes,room,gqa_b1_8k/L3000,mha_b1_4k/B3/L700'

Prints for each case the time with the choice of `tile_config` (Triton's plain kernel) or `_sm90.choose_levels`
(Hopper's), the best variant and what it would save. Triton's variants compile in parallel first, as compiling takes
longer than timing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import bench_attention
import torch
from bench_attention import Case, make_inputs, ours, pool_numel
from common import Pool, graph_us
from rich.console import Console
from rich.table import Table
from run import choose_cases

from medusa_kernels import _sm90, attention
from medusa_kernels._sm90 import Choice
from medusa_kernels._triton import tree_attention as kernels
from medusa_kernels._triton.tree_attention import TileConfig

TILES = [
    (64, 64, 4, 3),
    (64, 32, 4, 4),
    (64, 64, 4, 2),
    (64, 128, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 4),
]


def chosen_splits(case: Case, num_sms: int, arch: int) -> Choice:
    """What the longest request gets."""
    rows = case.nodes * case.heads // case.heads_kv
    heads = case.batch * case.heads_kv
    groups, cluster, levels = _sm90.choose_levels(rows, heads, case.capacity, num_sms, case.head_dim, case.fp8)
    tiles = -(-(case.length + case.nodes) // _sm90.KEYS)
    num_splits = [splits for reach, splits in levels if not reach or tiles <= reach][-1]
    return Choice(groups, cluster and num_splits > 1, num_splits)


def splits(case: Case, num_sms: int, arch: int) -> list[Choice]:
    """The choice first, then up to ten splits and parts of as many as the GPU holds at once, and clusters."""
    configs = [chosen_splits(case, num_sms, arch)]
    rows = case.nodes * case.heads // case.heads_kv
    for groups in (1, 2) if rows > 64 else (1,):
        blocks = case.batch * case.heads_kv * -(-rows // (64 * groups))
        resident = _sm90._resident(groups, num_sms, case.fp8)
        most = max(1, min(_sm90.MAX_SPLITS, -(-case.capacity // _sm90.KEYS), resident // blocks))
        parts = {round(most * share / 8) for share in range(1, 9)}
        configs += [Choice(groups, False, n) for n in sorted({*range(1, 11), *parts}) if 1 <= n <= most]
        if groups == 1 and not case.fp8:
            most = min(_sm90.MAX_CLUSTER, most, num_sms // blocks)
            configs += [Choice(groups, True, n) for n in range(2, most + 1)]
    return list(dict.fromkeys(configs))


@contextmanager
def replaced(module: ModuleType, **functions: Callable):
    """Within this, `tree_attention` prepares its launches with these functions of a module of its own."""
    attention._known.clear()  # launches prepared otherwise
    try:
        with mock.patch.multiple(module, **functions):
            yield
    finally:
        attention._known.clear()


def forced_splits(config: Choice):
    """Within this, `tree_attention` runs Hopper's kernel, where that serves the case, with these splits."""
    levels = [(0, config.num_splits)] * _sm90.LEVELS
    return replaced(_sm90, choose_levels=lambda *_: (config.groups, config.cluster, levels))


def chosen(case: Case, num_sms: int, arch: int) -> TileConfig:
    """What `tree_attention` takes for this case."""
    rows = case.nodes * case.heads // case.heads_kv
    heads = case.batch * case.heads_kv
    return kernels.tile_config(rows, case.head_dim, heads, case.capacity, 2, num_sms, arch)


def variants(case: Case, num_sms: int, arch: int) -> list[TileConfig]:
    """The choice first, then the tiles worth a try, each with half to four times the splits of one whole wave."""
    configs = [chosen(case, num_sms, arch)]
    rows = case.nodes * case.heads // case.heads_kv
    for block_m, block_n, num_warps, num_stages in TILES:
        if block_m > max(64, 2 * rows) or (block_m == 128 and case.head_dim > 128):
            continue
        programs = -(-rows // block_m) * case.batch * case.heads_kv
        most = max(1, -(-case.capacity // block_n) // 2)
        for waves in (0.5, 1, 2, 4):
            splits = min(max(1, int(num_sms * waves / programs)), most)
            configs.append(TileConfig(block_m, block_n, splits, 1, num_warps, num_stages))
    return list(dict.fromkeys(configs))


@contextmanager
def forced(config: TileConfig):
    """Within this, `tree_attention` runs the plain kernel with these tiles."""
    with replaced(kernels, tile_config=lambda *_: config), replaced(_sm90, prepare=lambda *_: None):
        yield


def compile_share(cases: list[Case], share: int, shares: int, device: torch.device, num_sms: int, arch: int) -> None:
    """Compile every `shares`-th variant into Triton's cache; what a batch needs compiled, one request needs too."""
    jobs = [(case, config) for case in cases for config in variants(case, num_sms, arch)]
    for case, config in jobs[share::shares]:
        single = replace(case, batch=1, ragged=False)
        inputs = make_inputs(single, Pool(pool_numel([single], 0), device), 0)
        with forced(config):
            try:
                ours(inputs).calls[0]()
            except Exception as error:  # a variant that does not fit is reported when it is timed
                print(f"{case.name} {config}: {error!r:.100}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="sweep", help="as for run.py")
    parser.add_argument("--kernel", choices=("triton", "hopper"), default="triton")
    parser.add_argument("--out", type=Path, help="write all times to this JSON file")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # SHARE/SHARES
    args = parser.parse_args()
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    card = properties.multi_processor_count, 10 * properties.major + properties.minor
    cases = choose_cases(bench_attention, args.cases)
    if args.kernel == "hopper":
        cases = [case for case in cases if case.head_dim in (64, 128) and not case.window]
        choice, others, force = chosen_splits, splits, forced_splits
    else:
        cases = [case for case in cases if not case.fp8]
        choice, others, force = chosen, variants, forced
    if args.compile:
        share, shares = map(int, args.compile.split("/"))
        compile_share(cases, share, shares, device, *card)
        return
    shares = 0 if args.kernel == "hopper" else min(14, os.cpu_count() or 1)
    commands = [[sys.executable, *sys.argv, "--compile", f"{i}/{shares}"] for i in range(shares)]
    for process in [subprocess.Popen(command) for command in commands]:
        process.wait()

    l2_bytes = properties.L2_cache_size
    pool = Pool(pool_numel(cases, l2_bytes), device)
    rows = []
    table = Table("case", "chosen µs", "best µs", "loses", "best tiles", title=properties.name)
    for case in cases:
        inputs = make_inputs(case, pool, l2_bytes)
        times = {}
        for config in others(case, *card):
            with force(config):
                try:
                    times[config] = graph_us(ours(inputs).calls, replays=10)
                except Exception as error:
                    print(f"{case.name} {config}: {error!r:.100}", file=sys.stderr)
        own, best = times[choice(case, *card)], min(times, key=times.__getitem__)
        table.add_row(case.name, f"{own:.1f}", f"{times[best]:.1f}", f"{own / times[best] - 1:.0%}", str(best))
        rows += [{"case": case.name, **asdict(config), "us": us} for config, us in times.items()]
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps({"card": properties.name, "times": rows}, indent=1))


if __name__ == "__main__":
    main()
