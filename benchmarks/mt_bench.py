"""Greedy tree decoding of MT-bench's first turns against `transformers`' own greedy `generate`, token for token.

    python benchmarks/mt_bench.py                                  # 80 prompts, 64 tokens, fp32, on the CPU
    python benchmarks/mt_bench.py --device cuda --dtype bfloat16 --json out.json

Prints steps, tokens and tokens a step by category, with the share of repeated 4-grams (loops flatter speculative
decoding), and explains each divergence: the gap between the two tokens' logits in fp64, beside what the forward pass
in the dtype under test is off by at that place. Exits with 1 if a divergence is not explained by that rounding.
"""

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from medusa_kernels.decoding import NgramDrafter, TreeDecoder, load_model
from medusa_kernels.decoding.models import SMOLLM2, chat_prompt
from medusa_kernels.training.evaluate import repeated_four_grams


def transformers_greedy(model, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[list[int]]:
    """New tokens of each prompt, an EOS included; prompts are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos
    )
    texts = out[:, width:].tolist()
    return [text[: text.index(eos) + 1] if eos in text else text for text in texts]


@torch.inference_mode()
def explain(model, exact_model, prompt: list[int], want: list[int], got: list[int]) -> dict:
    """Where two greedy texts part, and by how much: logits of the text before, in the dtype under test and in fp64."""
    at = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), min(len(want), len(got)))
    if at == min(len(want), len(got)):  # one text is the beginning of the other: that is never rounding
        return {"at": at, "gap": None, "explained": False}
    ids = torch.tensor([prompt + want[:at]], device=model.device)
    logits, exact = (m(ids).logits[0, -1].double() for m in (model, exact_model))
    gap = (exact[want[at]] - exact[got[at]]).abs().item()
    error = (logits - exact).abs().max().item()
    spacing = torch.finfo(model.dtype).eps * exact.max().abs().item()
    # Each of two runs may be off by the error at each of the two tokens.
    return {
        "at": at, "want": want[at], "got": got[at], "gap": gap, "error": error, "spacing": spacing,
        "explained": gap <= 2 * max(error, spacing),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="or a folder, or a name on the Hugging Face hub")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "mt_bench.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompts", type=int, default=None, help="only the first N prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="prompts decoded together, in both decoders")
    parser.add_argument("--num-nodes", type=int, default=16, help="nodes of a tree, root included")
    parser.add_argument("--json", type=Path, default=None, help="write all results to this file")
    args = parser.parse_args()
    console = Console()

    if args.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()][: args.prompts]
    for row in rows:
        row["prompt"] = chat_prompt(tokenizer, row["turns"][0])
    room = max(len(row["prompt"]) for row in rows) + args.max_new_tokens + args.num_nodes
    decoder = TreeDecoder(model, NgramDrafter(num_nodes=args.num_nodes), max_cache_len=room)
    eos = tokenizer.eos_token_id
    seconds = {"transformers": 0.0, "tree": 0.0}
    phases: dict[str, float] = defaultdict(float)
    with Progress(console=console, transient=True) as progress:
        for start in progress.track(range(0, len(rows), args.batch), description="decoding"):
            part = rows[start : start + args.batch]
            prompts = [row["prompt"] for row in part]
            began = time.perf_counter()
            wanted = transformers_greedy(model, prompts, args.max_new_tokens, eos)
            seconds["transformers"] += time.perf_counter() - began
            began = time.perf_counter()
            result = decoder.generate(prompts, args.max_new_tokens, eos_token_id=eos)
            seconds["tree"] += time.perf_counter() - began
            for phase, spent in result.stats.seconds.items():
                phases[phase] += spent
            for row, want, got, gains in zip(part, wanted, result.tokens, result.stats.gains):
                row.update(want=want, got=got, gains=gains)

    exact_model = None
    for row in rows:
        if row["got"] != row["want"]:
            exact_model = exact_model or copy.deepcopy(model).double()
            row["divergence"] = explain(model, exact_model, row["prompt"], row["want"], row["got"])

    table = Table(title=f"{args.model}, {args.dtype}, {args.device}, batch {args.batch}, trees of {args.num_nodes}")
    for column in ("category", "prompts", "identical", "tokens", "steps", "tokens/step", "repeated 4-grams"):
        table.add_column(column, justify="left" if column == "category" else "right")
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
        groups["all"].append(row)
    summary = {}
    for name in [name for name in groups if name != "all"] + ["all"]:
        group = groups[name]
        summary[name] = s = {
            "prompts": len(group),
            "identical": sum("divergence" not in row for row in group),
            "tokens": sum(len(row["got"]) for row in group),
            "steps": sum(1 + len(row["gains"]) for row in group),  # the one that gives the first token, too
            "repeated_4gram_share": repeated_four_grams([row["got"] for row in group]),
        }
        s["tokens_per_step"] = s["tokens"] / s["steps"]
        if name == "all":
            table.add_section()
        table.add_row(
            name, str(s["prompts"]), str(s["identical"]), str(s["tokens"]), str(s["steps"]),
            f"{s['tokens_per_step']:.2f}", f"{s['repeated_4gram_share']:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"seconds: transformers {seconds['transformers']:.1f}, tree {seconds['tree']:.1f}", highlight=False)
    diverging = [row for row in rows if "divergence" in row]
    for row in diverging:
        d = row["divergence"]
        gap = "one text ends early" if d["gap"] is None else (
            f"logit gap {d['gap']:.2e}, {args.dtype} error {d['error']:.2e}, spacing {d['spacing']:.2e}"
        )  # fmt: skip
        verdict = "rounding" if d["explained"] else "[red]NOT explained[/red]"
        console.print(f"prompt {row['id']} parts at token {d['at']}: {gap}: {verdict}", highlight=False)
    unexplained = sum(not row["divergence"]["explained"] for row in diverging)
    console.print(f"{len(diverging)} divergences of {len(rows)}, {unexplained} not explained by rounding")
    if args.json:
        keep = ("id", "category", "want", "got", "gains", "divergence")
        report = {
            "arguments": {
                name: value.name if isinstance(value, Path) else str(value) for name, value in vars(args).items()
            },
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
            "torch": torch.__version__,
            "seconds": seconds,
            "phases": phases,
            "summary": summary,
            "rows": [{name: row[name] for name in keep if name in row} for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
