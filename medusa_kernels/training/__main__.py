"""Training of Medusa heads, one command a stage:

    python -m medusa_kernels.training prompts  output=prompts.jsonl
    python -m medusa_kernels.training distill  prompts=prompts.jsonl output=answers
    python -m medusa_kernels.training medusa1  data=answers output=heads
    python -m medusa_kernels.training medusa2  data=answers output=medusa2
    python -m medusa_kernels.training search   data=answers heads=heads
    python -m medusa_kernels.training evaluate heads=heads prompts=questions.jsonl output=evaluation.json

Settings come from --config FILE.yaml and from key=value, which wins. A stage that was cut short goes on where it was
when it is started again; its exit status is 3 if it stopped because of max_seconds. Several GPUs: `accelerate launch
-m medusa_kernels.training ...` for distill, medusa1 and medusa2.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from . import config as c

COMMANDS: dict[str, type] = {
    "prompts": c.PromptsConfig, "distill": c.DistillConfig, "medusa1": c.Medusa1Config, "medusa2": c.Medusa2Config,
    "search": c.SearchConfig, "evaluate": c.EvaluateConfig,
}  # fmt: skip
OUT_OF_TIME = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m medusa_kernels.training", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    for name, cls in COMMANDS.items():
        defaults = [f"  {f.name}{'' if f.default is dataclasses.MISSING else f'={f.default}'}" for f in _fields(cls)]
        command = commands.add_parser(
            name, description=f"{cls.__doc__}\n\nkeys and their defaults:\n" + "\n".join(defaults),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.add_argument("--config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        return run(args.command, c.load_config(COMMANDS[args.command], args.config, args.overrides))
    except (ValueError, FileNotFoundError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2


def run(command: str, config: Any) -> int:
    # Imported here: `--help` and a wrong key need no model code.
    if command == "prompts":
        from .distill import make_prompts

        print(f"{make_prompts(config)} prompts in {config.output}")
    elif command == "distill":
        from .distill import distill

        if missing := distill(config):
            print(f"{missing} shards to go; start again to go on")
            return OUT_OF_TIME
    elif command in ("medusa1", "medusa2"):
        from .medusa1 import train_medusa1
        from .medusa2 import train_medusa2

        if not (train_medusa1 if command == "medusa1" else train_medusa2)(config):
            print("out of time; start again to go on")
            return OUT_OF_TIME
    elif command == "search":
        from .search import search

        result = search(config)
        for head, row in enumerate(result["head_accuracies"], start=1):
            print(f"head {head}: top-1 {row[0]:.3f}, top-{len(row)} {sum(row):.3f}")
        print(f"tokens a step, by tree: {result['tokens_per_step']}")
    else:
        from .evaluate import evaluate

        result = evaluate(config)
        for name, row in {**result["categories"], "all": result["all"]}.items():
            plain, medusa = row["plain"], row["medusa"]
            print(
                f"{name}: {medusa['tokens_per_step']:.2f} tokens a step, {medusa['tokens_per_s']:.0f} tokens/s, plain "
                f"{plain['tokens_per_s']:.0f}, {row['identical']} of {row['answers']} answers identical, "
                f"repeated 4-grams {row['repeated_4gram_share']:.1%}"
            )
    return 0


def _fields(cls: type) -> Any:
    return dataclasses.fields(cls)


if __name__ == "__main__":
    sys.exit(main())
