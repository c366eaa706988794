"""Write the measured tables of README.md and benchmarks/README.md from benchmarks/results: no figure there is typed by
hand.

    python benchmarks/readme.py

Each table stands between `<!-- results:NAME -->` and `<!-- /results -->`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = "nvidia-h200"


def older(row: dict, data: dict) -> str:
    """The date of a row that is older than its file's newest, in parentheses."""
    return "" if row.get("date", data["date"]) == data["date"] else f" ({row['date']})"


def run_of(data: dict) -> str:
    """Where and when a file's newest rows were measured."""
    card = data["card"]
    return f"{card['device']}, {data['date']}, torch {card['torch']}, triton {card['triton']}"


def operator_table(op: str, changed: bool = False) -> str:
    """A row a case: our time, the part of the floor that it is, and the best peer of the same run, with that run's date
    where it is not the newest one.

    changed: the cases that are another one with changes, in place of those that are none
    """
    data = json.loads((RESULTS / f"{CARD}_{op}.json").read_text())
    cases: dict[str, list[dict]] = {}
    for row in data["results"]:
        if row["us"] is not None and ("/" in row["case"]) == changed:
            cases.setdefault(row["case"], []).append(row)
    measured = {row["contender"] for rows in cases.values() for row in rows}
    more = {"ours_append": "appending µs", "ours_batch_invariant": "batch-invariant µs"}  # of ours
    more = {name: column for name, column in more.items() if name in measured}
    head = "| case | floor µs | µs | of floor | best peer µs | faster by |" + "".join(f" {c} |" for c in more.values())
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for case, rows in cases.items():
        ours = next(row for row in rows if row["contender"] == "ours")
        rows = [row for row in rows if older(row, data) == older(ours, data)]
        peers = [row for row in rows if not row["contender"].startswith("ours")]
        best = min((row for row in peers if row["same_work"]), key=lambda row: row["us"], default=None)
        peer = f"{best['us']:.1f} {best['contender']} | {best['us'] / ours['us']:.2f}x" if best else "- | -"
        if not best and (less := min(peers, key=lambda row: row["us"], default=None)):  # that does less work
            peer = f"({less['us']:.1f} {less['contender']}) | ({less['us'] / ours['us']:.2f}x)"
        share = ours["floor_us"] / ours["us"]
        label = case + older(ours, data)
        line = f"| {label} | {ours['floor_us']:.1f} | {ours['us']:.1f} | {share:.0%} | {peer} |"
        for name in more:
            us = next((row["us"] for row in rows if row["contender"] == name), None)
            line += " - |" if us is None else f" {us:.1f} |"
        lines.append(line)
    limits = data["limits"]
    about = (
        f"{run_of(data)}; measured in the same run: "
        f"read {limits['read_tb_s']:.2f} TB/s, bf16 matmul {limits['matmul_tflop_s']:.0f} TFLOP/s, "
        f"empty launch {limits['launch_us']:.1f} µs."
    )
    return "\n".join([f"**{op}**: {about}", "", *lines])


def decoding_table() -> str:
    """MT-bench by category, from `mt_bench.py`."""
    data = json.loads((RESULTS / "cpu_mt_bench.json").read_text())
    lines = ["| category | prompts | identical | tokens a step | repeated 4-grams |", "| --- | --- | --- | --- | --- |"]
    for name, row in data["summary"].items():
        lines.append(
            f"| {name} | {row['prompts']} | {row['identical']} | {row['tokens_per_step']:.2f} | "
            f"{row['repeated_4gram_share']:.0%} |"
        )
    arguments = data["arguments"]
    about = (
        f"{arguments['model']}, {arguments['dtype']} on a {data['device']}, first turns of MT-bench, "
        f"{arguments['max_new_tokens']} new tokens each, n-gram drafter with trees of {arguments['num_nodes']} nodes, "
        "compared token for token with `transformers`' greedy `generate`."
    )
    return "\n".join([f"**decoding**: {about}", "", *lines])


HEADS = {
    "paper": "Medusa-1, heads as in the paper",
    "medusa1": "Medusa-1, heads that see the root",
    "hard": "the same, trained on tokens alone",
    "sequential": "Medusa-1, sequential heads",
    "medusa2": "Medusa-2, heads that see the root",
}


def medusa_table() -> str:
    """SmolLM2-135M-Instruct with each kind of heads, from `medusa_smollm2.py`; by category, the heads that it ships."""
    path = RESULTS / f"{CARD}_medusa_smollm2.json"
    if not path.is_file():
        return "**Medusa heads**: not measured yet."
    data = json.loads(path.read_text())
    lines = [
        "| heads | tokens a step, MT-bench | dynamic trees | same fp32 text | top-1 by head | tokens/s | faster by | "
        "fused layers: tokens/s | faster by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in data["variants"].items():
        evaluation = row.get("evaluation")
        steps = f"{evaluation['mt_bench']['tokens_per_step']:.2f}" if evaluation else "-"
        dynamic = "; ".join(
            f"{each['mt_bench']['tokens_per_step']:.2f} ({size} nodes)"
            for size, each in row.get("dynamic_trees", {}).items()
        )
        same = "-"
        if evaluation and evaluation["dtype"] == "float32":
            same = f"{evaluation['all']['identical']} of {evaluation['all']['answers']}"
        top1 = " / ".join(f"{share:.2f}" for share in row["search"]["top1"]) if "search" in row else "-"
        rates = " | ".join(
            f"{row[key]['medusa']['tokens_per_s']:.0f} | {row[key]['speedup']:.2f}x" if key in row else "- | -"
            for key in ("timed", "timed_fused")
        )
        lines.append(f"| {HEADS[name]} | {steps} | {dynamic or '-'} | {same} | {top1} | {rates} |")
    about = (
        f"SmolLM2-135M-Instruct, {data['device']}, {data['date']}, torch {data['torch']}. Greedy, trees of "
        f"{data['sizes']['num_nodes']} nodes"
    )
    if each := next((row["evaluation"] for row in data["variants"].values() if "evaluation" in row), None):
        about += (
            f". Tokens a step and same text: {each['all']['answers']} answers of up to {each['max_new_tokens']} tokens "
            f"in batches of {each['batch_size']}, against plain decoding token for token"
        )
    if each := next((row["timed"] for row in data["variants"].values() if "timed" in row), None):
        about += (
            f". Tokens/s: {each['answers']} answers of up to {each['max_new_tokens']} tokens, {each['dtype']}, one "
            "request, CUDA graphs, without prefill; faster than the same decoder without heads. Step overhead: a step "
            "with a tree by a step without"
        )
    if data["transformers_tokens_per_s"]:
        about += f"; `transformers`' `generate`: {data['transformers_tokens_per_s']:.0f} tokens/s"
    if data["distill"]:
        folders = data["distill"]["folders"].values()
        tokens, seconds = sum(each["answer_tokens"] for each in folders), data["distill"]["seconds"]
        about += f". Trained on {tokens / 1e6:.1f} M answer tokens, distilled in {seconds:.0f} s"
    out = [f"**Medusa heads**: {about}.", "", *lines]
    if perplexity := data["variants"].get("medusa2", {}).get("perplexity"):
        change = perplexity["trained"] / perplexity["original"] - 1
        out += ["", f"Medusa-2 changes the model: its perplexity on held-out text by {change:+.2%}."]
    if sampled := data["temperature_0.7"]:
        rates = ", ".join(f"{mode} {row['mt_bench']['tokens_per_step']:.2f}" for mode, row in sampled.items())
        out += ["", f"At temperature 0.7, tokens a step on MT-bench, heads that see the root: {rates}."]
    if evaluation := data["variants"].get("medusa1", {}).get("evaluation"):
        row = data["variants"]["medusa1"]
        timed = row.get("timed_fused") or row.get("timed")
        out += [
            "",
            "| heads that see the root | answers | identical | tokens a step | repeated 4-grams | step overhead | "
            "tokens/s | faster by |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in {**evaluation["categories"], "all": evaluation["all"]}.items():
            rate = "- | - | -"
            if each := ({**timed["categories"], "all": timed} if timed else {}).get(name):
                per_s = each["medusa"]["tokens_per_s"] if name == "all" else each["tokens_per_s"]
                rate = f"{each['overhead']:.2f} | {per_s:.0f} | {each['speedup']:.2f}x"
            out.append(
                f"| {name} | {row['answers']} | {row['identical']} | {row['tokens_per_step']:.2f} | "
                f"{row['repeated_4gram_share']:.0%} | {rate} |"
            )
    return "\n".join(out)


def step_table() -> str:
    """Whole steps, from `step.py`: a tree's against the best plain one, at the size that mostly pays best."""
    from step import MODELS

    data = json.loads((RESULTS / f"{CARD}_step.json").read_text())
    parts = ("matmuls", "attention", "rest", "acceptance", "compaction")
    attention = {
        (step["model"], step["batch"], step["length"], step["nodes"]):
            f"{step['parts_us']['attention'] / MODELS[step['model']].layers:.1f}"
        for step in data["steps"]
    }  # fmt: skip
    head = ["model", "B", "L", "nodes", "plain µs", "tree µs", "overhead", *(f"{part} %" for part in parts)]
    head += ["attention µs a layer", "speed-up"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in data["overheads"]:
        if row["length"] not in (1024, 4096) or row["nodes"] != (64 if row["batch"] == 1 else 16):
            continue
        shares = " | ".join(f"{row['parts_percent'][part]:+.1f}" for part in parts)
        where = row["model"], row["batch"], row["length"]
        lines.append(
            f"| {row['model']}{older(row, data)} | {row['batch']} | {row['length']} | {row['nodes']} | "
            f"{row['plain_us']:.0f} | {row['us']:.0f} | {row['overhead']:.3f} | {shares} | "
            f"{attention[(*where, 1)]}, {attention[(*where, row['nodes'])]} | {row['speed_up']:.2f}x |"
        )
    about = (
        f"{run_of(data)}; random weights, bf16, each step in a CUDA graph. Plain decoding is the fastest of up to 12 "
        "ways: rows as they are or padded to 16 or 64, our attention or SDPA, our sampler or PyTorch's argmax. "
        "Overhead: a tree's step by a plain one, and what of it is whose, in percent of a plain step. Attention: of a "
        "layer, what it makes a plain step and a tree's longer. Speed-up: by the accuracies of published heads for "
        "Vicuna-7B, without the time that drafting takes"
    )
    return "\n".join([f"**step**: {about}.", "", *lines])


def every_step_table() -> str:
    """All of them: a line for each model, batch and length, a column for each size of tree."""
    data = json.loads((RESULTS / f"{CARD}_step.json").read_text())
    sizes = sorted({row["nodes"] for row in data["overheads"]})
    steps: dict[tuple, dict[int, dict]] = {}
    for row in data["overheads"]:
        steps.setdefault((row["model"], row["batch"], row["length"]), {})[row["nodes"]] = row
    best = {(row["model"], row["batch"], row["length"]): row["nodes"] for row in data["best_sizes"]}
    head = ["model", "B", "L", "plain µs", *(f"{size} nodes" for size in sizes), "best size"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for where, rows in steps.items():
        cells = (
            f"{rows[size]['overhead']:.2f}, {rows[size]['speed_up']:.2f}x" if size in rows else "-" for size in sizes
        )
        plain = next(iter(rows.values()))["plain_us"]
        lines.append(f"| {' | '.join(map(str, where))} | {plain:.0f} | {' | '.join(cells)} | {best[where]} |")
    about = (
        f"{run_of(data)}. Of each size of tree: its step's time over a plain one's, and the speed-up by the accuracies "
        "of published heads for Vicuna-7B"
    )
    return "\n".join([f"**step**: {about}.", "", *lines])


TABLES = {
    "decoding": decoding_table, "medusa": medusa_table, "step": step_table,
    "every_step": every_step_table,
    "attention_off_table": lambda: operator_table("attention", changed=True),
}  # fmt: skip


def render(text: str) -> str:
    """A text with every table made anew."""

    def table(match: re.Match) -> str:
        name = match[1]
        body = TABLES[name]() if name in TABLES else operator_table(name)
        return f"<!-- results:{name} -->\n{body}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->.*?<!-- /results -->", table, text, flags=re.S)


if __name__ == "__main__":
    for readme in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        readme.write_text(render(readme.read_text()))
