"""Watch a model decode: plain greedy decoding, then trees of draft tokens, one below the other.

    python -m medusa_kernels.decoding.demo

Both run in the same decoder with the same kernels; plain decoding just drafts nothing. Drafts come from Medusa heads,
where the package brings them for the model, else from n-gram look-up. In the tree's text each step's tokens have a
colour of their own. Runs on a GPU if there is one, else on the CPU.
"""

import argparse
import json
import sys
import time
from importlib import resources
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .cpu import pack_linears
from .decoder import PHASES, DecodeStats, TreeDecoder
from .drafters import Drafter, NgramDrafter, NoDrafter
from .medusa import load_drafter, shipped_heads
from .models import SMOLLM2, chat_prompt, load_model

COLOURS = ("bright_green", "bright_cyan")


def stream_text(
    console: Console,
    decoder: TreeDecoder,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int,
    colours: tuple[str, ...],
) -> tuple[list[int], float]:
    """Decode one prompt and print its text as it comes; returns tokens and seconds."""
    tokens: list[int] = []
    shown = ""
    began = time.perf_counter()
    for step, (new,) in enumerate(decoder.stream([prompt], max_new_tokens, profile=True)):
        tokens += new
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # part of a character
            console.print(Text(text[len(shown) :], style=colours[step % len(colours)]), end="", soft_wrap=True)
            shown = text
    seconds = time.perf_counter() - began
    console.print()
    return tokens, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="or a folder, or a name on the Hugging Face hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompts", type=int, default=3, help="how many of the eight prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--heads", help="folder of Medusa heads (default: those that come with the package, if any)")
    parser.add_argument("--num-nodes", type=int, default=None, help="nodes of a tree (default: 16 on the CPU, 64)")
    args = parser.parse_args()
    console = Console(highlight=False)

    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "the CPU"
    with console.status(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    # On 2 cores SmolLM2 takes the same time for 2 to 16 nodes, within a tenth, and a third more for 32.
    num_nodes = args.num_nodes or (16 if model.device.type == "cpu" else 64)
    heads = args.heads or shipped_heads(args.model)
    drafter: Drafter = load_drafter(heads, model, num_nodes) if heads else NgramDrafter(num_nodes=num_nodes)
    if model.device.type == "cpu":
        pack_linears(model)
    source = "Medusa heads" if heads else "n-gram look-up"
    console.print(f"{args.model}, {args.dtype}, on {where}; trees of {drafter.num_nodes} nodes from {source}")
    data = json.loads((resources.files(__package__) / "data" / "demo_prompts.json").read_text(encoding="utf-8"))
    messages = [row["prompt"] for row in data["prompts"]][: args.prompts]
    prompts = [chat_prompt(tokenizer, message) for message in messages]
    room = max(map(len, prompts)) + args.max_new_tokens + num_nodes
    decoders = {
        "plain": TreeDecoder(model, NoDrafter(), max_cache_len=room),
        "tree": TreeDecoder(model, drafter, max_cache_len=room),
    }
    if model.device.type == "cuda":
        with console.status("compiling kernels and capturing CUDA graphs"):
            for decoder in decoders.values():
                for prompt in prompts:
                    decoder.generate([prompt], 2, profile=True)

    seconds = dict.fromkeys(decoders, 0.0)
    stats: dict[str, list[DecodeStats]] = {name: [] for name in decoders}
    identical = 0
    for message, prompt in zip(messages, prompts):
        console.print(Rule(), Text(message, style="bold"), sep="\n")
        texts = {}
        for name, decoder in decoders.items():
            console.print(Rule(f"{name} greedy decoding" if name == "plain" else "tree decoding", style="dim"))
            colours = COLOURS if name == "tree" else ("default",)
            texts[name], spent = stream_text(console, decoder, tokenizer, prompt, args.max_new_tokens, colours)
            seconds[name] += spent
            stats[name].append(decoder.stats)
        same = texts["plain"] == texts["tree"]
        identical += same
        verdict = "[green]identical[/green]" if same else "[red]not identical[/red]"
        if not same and args.dtype != "float32":
            verdict += f" (in {args.dtype} near-ties between two tokens may fall either way)"
        console.print(f"\n{verdict}, {decoders['tree'].stats.tokens_per_step:.2f} tokens a step")

    table = Table(title=f"identical: {'yes' if identical == len(prompts) else 'NO'} ({identical} of {len(prompts)})")
    table.add_column("")
    for name in decoders:
        table.add_column(name, justify="right")
    gains = {name: [g for s in each for request in s.gains for g in request] for name, each in stats.items()}
    tokens = {name: sum(s.tokens for s in each) for name, each in stats.items()}
    table.add_row("tokens a step", *(f"{sum(gains[name]) / max(len(gains[name]), 1):.2f}" for name in decoders))
    table.add_row("tokens a second", *(f"{tokens[name] / seconds[name]:.1f}" for name in decoders))
    table.add_section()
    for phase in PHASES:
        spent_ms = (1e3 * sum(s.seconds[phase] for s in each) for each in stats.values())
        table.add_row(f"ms in {phase}", *(f"{ms:.1f}" for ms in spent_ms))
    console.print(table)
    return 0 if identical == len(prompts) or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
