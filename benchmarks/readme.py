"""Write the measured tables of README.md from benchmarks/results: no figure there is typed by hand.

    python benchmarks/readme.py

Each table stands between `<!-- results:NAME -->` and `<!-- /results -->`.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = "nvidia-h100-80gb-hbm3"


def operator_table(op: str) -> str:
    """A row a case: our time, the part of the floor that it is, and the best peer of the same run."""
    data = json.loads((RESULTS / f"{CARD}_{op}.json").read_text())
    cases: dict[str, list[dict]] = {}
    for row in data["results"]:
        if row["us"] is not None:
            cases.setdefault(row["case"], []).append(row)
    lines = ["| case | floor µs | µs | of floor | best peer µs | faster by |", "| --- | --- | --- | --- | --- | --- |"]
    for case, rows in cases.items():
        ours = next(row for row in rows if row["contender"] == "ours")
        peers = [row for row in rows if row["same_work"] and not row["contender"].startswith("ours")]
        best = min(peers, key=lambda row: row["us"], default=None)
        peer = f"{best['us']:.1f} {best['contender']} | {best['us'] / ours['us']:.2f}x" if best else "- | -"
        share = ours["floor_us"] / ours["us"]
        lines.append(f"| {case} | {ours['floor_us']:.1f} | {ours['us']:.1f} | {share:.0%} | {peer} |")
    card, limits = data["card"], data["limits"]
    about = (
        f"{card['device']}, {data['date']}, torch {card['torch']}, triton {card['triton']}; measured in the same run: "
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


def render(text: str) -> str:
    """README's text with every table made anew."""

    def table(match: re.Match) -> str:
        name = match[1]
        body = decoding_table() if name == "decoding" else operator_table(name)
        return f"<!-- results:{name} -->\n{body}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\w+) -->.*?<!-- /results -->", table, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
