"""Benchmarks of the operators against their peers: `python benchmarks/run.py --op attention --cases table`.

Prints each result as it comes and a table at the end, and writes <card>_<op>.json and .png; see README.md.
"""

import argparse
import datetime
import importlib
import json
from fnmatch import fnmatch
from pathlib import Path

import torch
from common import Limits, Result, best_peer, measure_cases, measure_limits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

OPS = ("attention", "acceptance", "compaction")


def choose(patterns: str | None, names: list[str]) -> list[str]:
    """Those of `names` that match one of the comma-separated patterns, in their own order; all of them without any."""
    if patterns is None:
        return names
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"expected names or globs of {', '.join(names)}, got {pattern!r}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]


def choose_cases(bench, text: str) -> list:
    """Sets of cases (`table`), globs over the table (`gqa_*`, also `gqa_*/paged64`), or single cases with changes."""
    names: list[str] = []
    for part in text.split(","):
        base, slash, changes = part.partition("/")
        matched = bench.SETS.get(part) or [name + slash + changes for name in bench.TABLE if fnmatch(name, base)]
        names += matched or [part]
    return [bench.parse_case(name) for name in dict.fromkeys(names)]


def describe(result: Result) -> str:
    if result.us is None:
        return f"{result.case:28} {result.contender:22} {result.status}: {result.note}"
    floor = f"{result.fraction:6.1%} of floor" if result.floor_us else ""
    return f"{result.case:28} {result.contender:22} {result.us:9.1f} µs  {floor}  error {result.error:.1e}"


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def as_table(op: str, cases: list, results: list[Result], limits: Limits, smoke: bool) -> Table:
    title = f"{op} | {limits.device} | torch {limits.torch}, triton {limits.triton}"
    if smoke:
        title += " | SMOKE TEST: wall-clock on a CPU, no measure of speed"
    else:
        title += f" | read {limits.read_tb_s:.2f} TB/s, bf16 matmul {limits.matmul_tflop_s:.0f} TFLOP/s"
        title += f", empty launch {limits.launch_us:.1f} µs"
    table = Table(title=title)
    for column in ("case", "contender"):
        table.add_column(column)
    for column in ("µs", "TB/s", "TFLOP/s", "of floor", "ours is faster by", "host µs", "error", "recorded elsewhere"):
        table.add_column(column, justify="right")
    for case in cases:
        rows = [r for r in results if r.case == case.name and r.status != "unsupported"]
        ours = next((r for r in rows if r.contender == "ours" and r.us), None)
        best = None if smoke else best_peer(rows)
        for i, r in enumerate(rows):
            label = case.name if i == 0 else ""
            if i == 0 and r.floor_us:
                label += f" (floor {r.floor_us:.1f})"
            name = r.contender + ("" if r.same_work else " (less work)") + (" ← best peer" if r is best else "")
            recorded = number(case.recorded.get(r.contender), ".0f")
            if r.us is None:
                table.add_row(label, name, r.status.upper(), "", "", "", "", "", r.note[:60], recorded)
                continue
            ratio = "" if smoke or ours is None or r is ours else f"{r.us / ours.us:.2f}x"
            if not r.same_work and ratio:
                ratio = f"({ratio})"
            table.add_row(
                label, name, f"{r.us:.1f}" + ("" if r.in_graph or smoke else " eager"), number(r.tb_s, ".2f"),
                number(r.tflop_s or None, ".0f"), f"{r.fraction:.0%}" if r.floor_us else "", ratio,
                number(r.host_us, ".1f"), f"{r.error:.1e}", recorded,
            )  # fmt: skip
        shown = {r.contender for r in rows}
        for peer, us in case.recorded.items():
            if peer not in shown:
                table.add_row("", f"{peer} (not run here)", "", "", "", "", "", "", "", f"{us:.0f}")
        table.add_section()
    return table


def not_run(results: list[Result]) -> dict[tuple[str, str], str]:
    """(contender, reason) to the cases it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if r.status == "unsupported":
            cases.setdefault((r.contender, r.note), []).append(r.case)
    every = len({r.case for r in results})
    return {key: "any case" if len(names) == every else ", ".join(names) for key, names in cases.items()}


def write_json(path: Path, op: str, results: list[Result], limits: Limits) -> list[dict]:
    """Merged by (case, contender) into what the file holds of the same card and versions. Returns all."""
    date = datetime.date.today().isoformat()
    rows = {(r.case, r.contender): r.as_json() | {"date": date} for r in results}
    card = {"device": limits.device, "torch": limits.torch, "triton": limits.triton}
    if path.exists():
        old = json.loads(path.read_text())
        if old["card"] == card:
            rows = {(r["case"], r["contender"]): {"date": old["date"]} | r for r in old["results"]} | rows
    limit = {k: v for k, v in vars(limits).items() if k not in card}
    merged = list(rows.values())
    content = {"op": op, "date": date, "card": card, "limits": limit, "results": merged}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return merged


def plot(path: Path, op: str, rows: list[dict], limits: Limits, smoke: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [r for r in rows if r["us"]]
    if not timed:
        return
    cases = list(dict.fromkeys(r["case"] for r in timed))
    contenders = list(dict.fromkeys(r["contender"] for r in timed))
    figure, axes = plt.subplots(figsize=(max(7, 0.45 * len(cases) + 6), 5.5))
    for contender in contenders:
        points = [(cases.index(r["case"]), r["us"]) for r in timed if r["contender"] == contender]
        is_ours = contender == "ours"
        axes.plot(
            *zip(*points), "o" if is_ours else "x", label=contender, ms=8 if is_ours else 6, zorder=3 if is_ours else 2
        )
    floors = {r["case"]: r["floor_us"] for r in timed if r["floor_us"]}
    if floors:
        axes.hlines(
            list(floors.values()), *([cases.index(c) + d for c in floors] for d in (-0.35, 0.35)), "k", label="floor"
        )
    axes.set(yscale="log", ylabel="wall-clock µs (smoke test)" if smoke else "µs a call, CUDA graph, cold L2")
    axes.set_title(f"{op}, {limits.device}, torch {limits.torch}, triton {limits.triton}")
    axes.set_xticks(range(len(cases)), cases, rotation=40, ha="right")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def run_op(op: str, args: argparse.Namespace, limits: Limits, console: Console) -> list[Result]:
    bench = importlib.import_module(f"bench_{op}")
    device = torch.device(args.device)
    smoke = device.type != "cuda"
    cases = bench.TINY if smoke else choose_cases(bench, args.cases)
    contenders = choose(args.peers, list(bench.CONTENDERS))
    stem = None if args.out is None else args.out / f"{limits.slug}_{op}"
    merged: list[dict] = []  # what the file of results holds
    if stem is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(op, total=len(cases) * len(contenders))

        def report(result: Result) -> None:
            if stem is not None:  # a later contender may break the device, or time run out
                merged[:] = write_json(stem.with_suffix(".json"), op, [result], limits)
            progress.console.print(describe(result), highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)

        results = measure_cases(bench, cases, contenders, limits, device, 10 if args.quick else 30, report)
    console.print(as_table(op, cases, results, limits, smoke))
    for (name, note), where in not_run(results).items():
        console.print(f"{name} not run on {where}: {note}", highlight=False, markup=False, soft_wrap=True)
    if stem is not None:
        plot(stem.with_suffix(".png"), op, merged, limits, smoke)
        console.print(f"{stem}.json, .png")
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, help="default: all three")
    parser.add_argument(
        "--cases", default="table", help="comma-separated sets, globs or cases with changes; see --list"
    )
    parser.add_argument("--peers", help="comma-separated contenders, globs allowed; default: all (`ours*`: ours alone)")
    parser.add_argument("--quick", action="store_true", help="10 replays of a graph instead of 30")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu: a smoke test on tiny cases")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results, nothing on a CPU")
    parser.add_argument("--list", action="store_true", help="print cases, sets and contenders")
    args = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 170)
    ops = [args.op] if args.op else OPS
    if args.list:
        for op in ops:
            bench = importlib.import_module(f"bench_{op}")
            for name, names in bench.SETS.items():
                console.print(f"{op}: set {name}: {' '.join(names)}", highlight=False)
            console.print(f"{op}: contenders: {' '.join(bench.CONTENDERS)}", highlight=False)
        return 0
    if args.out is None and args.device == "cuda":
        args.out = Path(__file__).resolve().parent / "results"
    limits = measure_limits(torch.device(args.device), args.quick)
    results = [r for op in ops for r in run_op(op, args, limits, console)]
    return 1 if any(r.contender.startswith("ours") and r.status in ("wrong", "failed") for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
