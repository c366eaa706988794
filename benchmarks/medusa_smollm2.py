"""SmolLM2-135M-Instruct from prompts to measured heads: distil, train, search, evaluate.

    python benchmarks/medusa_smollm2.py --prompts PROMPTS.jsonl --questions MT_BENCH.jsonl SPEC_BENCH.jsonl

Each stage skips what is done, so that the same command goes on where it was. In two halves, with the answers carried
from one machine to the other in a few files:

    python benchmarks/medusa_smollm2.py --stage distill --distill-seconds 150 --pack PACKED ...
    python benchmarks/medusa_smollm2.py --stage train evaluate time --data PACKED --train-seconds 150 ...

The model answers the given prompts and prompts of its own, greedily and at temperature 0.3: greedy text is what is
evaluated, and near-greedy text leads through contexts that greedy text alone does not show. Then, side by side:
Medusa-1 with the paper's heads (`paper`) and with heads that see the root (`medusa1`), sequential heads (`sequential`)
and Medusa-2 (`medusa2`); asked for by name, `hard`, `medusa1` without the model's own distribution as a target.
Texts and tokens a step come from batches, decoded side by side too; what is timed runs alone on its GPU, once more with
Liger's layers where `liger-kernel` is installed. Jobs side by side spread over the machine's GPUs.
Everything goes to benchmarks/results/<card>_medusa_smollm2.json.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PART_BYTES = 14 * 2**20  # of packed answers
FOLDERS = ("greedy", "greedy_own", "sampled")
ALONE = ("medusa1", "sequential")  # whose text is compared in fp32, and which get dynamic trees too
VARIANTS = {  # command of medusa_kernels.training, and its settings
    "paper": ("medusa1", ["sees_root=false", "num_layers=1", "learning_rate=2e-3"]),
    "medusa1": ("medusa1", ["num_layers=2", "learning_rate=2e-3"]),
    "hard": ("medusa1", ["num_layers=2", "learning_rate=2e-3", "soft=0"]),
    "sequential": ("medusa1", ["sequential=true", "num_layers=3", "learning_rate=2e-3"]),
    "medusa2": ("medusa2", ["num_layers=2", "learning_rate=2.5e-4", "heads_lr_multiple=6", "heads_weight=0.01"]),
}


@dataclasses.dataclass
class Sizes:
    own: int = 65536  # drawn; about half are kept
    batch: int = 1024
    prompt_tokens: int = 256  # 2 % of the given prompts are longer
    new_tokens: int = 256
    prompts: int | None = None  # of the given ones
    train_batch: int = 64
    epochs: int = 4  # at most: the seconds end the training
    holdout: int = 2048  # never trained on; the search takes some of the greedy ones
    search_holdout: int = 512
    top_k: int = 24
    num_nodes: int = 64
    eval_batch: int = 20  # a category has 10 or 20 questions
    questions: int | None = None
    cache: int = 2560
    timed_per_category: int = 1


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


# For a look at whether it runs, on a CPU too.
QUICK = Sizes(
    own=24, batch=12, new_tokens=24, prompts=24, train_batch=4, epochs=1, holdout=12, search_holdout=8, top_k=64,
    num_nodes=4, eval_batch=2, questions=2, cache=512,
)  # fmt: skip


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Nothing outside the folder, where this Python's tarfile sees to it (3.10.12, 3.11.4 and later)."""
    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
    tar.extractall(folder)


class Run:
    def __init__(self, args: argparse.Namespace):
        self.args, self.sizes, self.work = args, QUICK if args.quick else Sizes(), args.work.resolve()
        self.model, self.failed = self.work / "model", []
        self.jobs, self.lock = [0] * max(1, count_gpus()), threading.Lock()  # running on each GPU
        (self.work / "logs").mkdir(parents=True, exist_ok=True)

    def training(self, name: str, *arguments: str) -> bool:
        """`python -m medusa_kernels.training` on the GPU with the fewest jobs, its output in logs/. False, and noted,
        if it failed."""
        log, began = self.work / "logs" / f"{name}.log", time.monotonic()
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}
        with self.lock:
            gpu = self.jobs.index(min(self.jobs))
            self.jobs[gpu] += 1
        if len(self.jobs) > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with log.open("a") as out:
            command = [sys.executable, "-m", "medusa_kernels.training", *arguments]
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env).returncode
        with self.lock:
            self.jobs[gpu] -= 1
        good = code in (0, 3)  # 3: out of time
        how = "done" if good else f"FAILED ({code}), see {log}"
        lines = log.read_text(errors="replace").splitlines()  # at a progress bar's carriage returns, too
        print(f"{name}: {how}, {time.monotonic() - began:.0f} s", *lines[-2 if good else -12 :], sep="\n  ", flush=True)
        if not good:
            self.failed.append(name)
        return good

    def together(self, *jobs, at_once: int | None = None) -> None:
        with ThreadPoolExecutor(at_once or len(jobs) or 1) as pool:
            for job in [pool.submit(job) for job in jobs]:
                job.result()

    def prepare(self) -> None:
        """The model as a folder, which loads much faster than the GGUF file."""
        if not (self.model / "config.json").is_file():
            from medusa_kernels.decoding import load_model

            model, tokenizer = load_model()
            tokenizer.save_pretrained(self.model)
            model.save_pretrained(self.model)

    # ---- distil ----

    def distill(self) -> None:
        sizes, own = self.sizes, self.work / "own.jsonl"
        common = [
            f"model={self.model}", f"batch_size={sizes.batch}", f"shard_size={sizes.batch}",
            f"max_prompt_tokens={sizes.prompt_tokens}", f"max_new_tokens={sizes.new_tokens}",
        ]  # fmt: skip
        given = f"prompts=[{self.args.prompts.resolve()}]"
        limit = [] if sizes.prompts is None else [f"limit={sizes.prompts}"]
        began = time.monotonic()

        def draw() -> None:
            if not own.is_file():
                drawn = [f"model={self.model}", f"count={sizes.own}", f"batch_size={sizes.batch}", f"output={own}"]
                self.training("own_prompts", "prompts", *drawn)

        def answer(name: str, *more: str) -> None:
            left = max(self.args.distill_seconds - (time.monotonic() - began), 1)
            self.training(name, "distill", *common, f"output={self.work / name}", f"max_seconds={left:.0f}", *more)

        self.together(draw, lambda: answer("greedy", given, "temperature=0", *limit))
        both = f"prompts=[{self.args.prompts.resolve()},{own}]"
        self.together(
            lambda: answer("greedy_own", f"prompts=[{own}]", "temperature=0"),
            lambda: answer("sampled", both, "temperature=0.3", *limit),
        )
        self.note("distill", {"seconds": time.monotonic() - began, "folders": {n: self.counts(n) for n in FOLDERS}})
        if self.args.pack:
            self.pack()

    def counts(self, name: str) -> dict[str, int]:
        from medusa_kernels.training.data import read_jsonl

        count = {"answers": 0, "prompt_tokens": 0, "answer_tokens": 0}
        for shard in (self.work / name).glob("shard-*.gz"):
            for row in read_jsonl(shard):
                count["answers"] += 1
                count["prompt_tokens"] += len(row["prompt"])
                count["answer_tokens"] += len(row["answer"])
        log = self.work / "logs" / f"{name}.log"
        if rates := re.findall(r"tokens_per_s=(\d+)", log.read_text(errors="replace") if log.is_file() else ""):
            count["tokens_per_s"] = int(rates[-1])  # of this process since its start, beside another one
        return count

    def pack(self) -> None:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name in ("own.jsonl", "distill.json", *FOLDERS):
                if (self.work / name).exists():
                    tar.add(self.work / name, name)
        self.args.pack.mkdir(parents=True, exist_ok=True)
        for i, start in enumerate(range(0, data.tell(), PART_BYTES)):
            part = data.getbuffer()[start : start + PART_BYTES]
            (self.args.pack / f"answers.tar.{i:02d}").write_bytes(part)

    def unpack(self) -> None:
        if any((self.work / name).exists() for name in FOLDERS):
            return  # those of a run on this machine
        parts = sorted(self.args.data.glob("answers.tar.*"))
        if not parts:
            raise FileNotFoundError(f"--data: no answers.tar.* in {self.args.data}")
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
            extract(tar, self.work)

    # ---- train and search ----

    def train(self) -> None:
        folders = [str(self.work / name) for name in FOLDERS if list((self.work / name).glob("shard-*.gz"))]
        greedy = [folder for folder in folders if not folder.endswith("sampled")]
        sizes = self.sizes

        def variant(name: str) -> None:
            command, settings = VARIANTS[name]
            output, trained = self.work / name, self.work / "medusa1"
            if command == "medusa2" and (trained / "tree.json").is_file():  # heads there are, of an earlier run
                settings = [*settings, f"heads={trained}", "stage1=0.1"]
            self.note(f"settings_{name}", settings)
            if not (output / "medusa_heads.safetensors").is_file() and not self.training(
                f"train_{name}", command, f"model={self.model}", f"data=[{','.join(folders)}]", f"output={output}",
                f"batch_size={sizes.train_batch}", f"epochs={sizes.epochs}", f"seconds={self.args.train_seconds}",
                f"holdout={sizes.holdout}", "save_every=100000", *settings,
            ):  # fmt: skip
                return
            if not (output / "tree.json").is_file():
                # On greedy answers, as they are what is evaluated. The training's holdout is larger: none was seen.
                self.training(
                    f"search_{name}", "search", f"model={self.of(name)}", f"data=[{','.join(greedy)}]",
                    f"heads={output}", f"holdout={sizes.search_holdout}", f"top_k={sizes.top_k}",
                    f"num_nodes={sizes.num_nodes}", "batch_size=64",
                )  # fmt: skip

        self.together(*(lambda name=name: variant(name) for name in self.args.variants))
        for name in self.done():
            self.pack_heads(name)
        self.report()

    def of(self, name: str) -> Path:
        """The model that the heads are for."""
        return self.work / name / "model" if VARIANTS[name][0] == "medusa2" else self.model

    def done(self) -> list[str]:
        return [
            name for name in self.args.variants
            if (self.work / name / "tree.json").is_file() and (self.of(name) / "config.json").is_file()
        ]  # fmt: skip

    def pack_heads(self, name: str) -> None:
        """Heads in float16 with their tree, as the package ships them, and how they were trained, in a tar file."""
        import torch

        from medusa_kernels.decoding import load_model
        from medusa_kernels.decoding.heads import MedusaHeads
        from medusa_kernels.decoding.models import SMOLLM2

        model, _ = load_model(str(self.model))
        folder = self.work / "packed" / name
        heads = MedusaHeads.from_pretrained(self.work / name, model).to(torch.float16)
        heads.save_pretrained(folder, SMOLLM2)
        for file in ("tree.json", "log.jsonl", "metrics.json"):
            if (self.work / name / file).is_file():
                shutil.copy(self.work / name / file, folder)
        self.args.out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.args.out / f"heads_{name}.tar", "w") as tar:
            tar.add(folder, name)

    def unpack_heads(self) -> None:
        for path in sorted(self.args.heads.glob("heads_*.tar")):
            if not (self.work / path.stem.removeprefix("heads_")).exists():
                with tarfile.open(path) as tar:
                    extract(tar, self.work)

    # ---- evaluate ----

    def dynamic(self) -> list[tuple[str, int]]:
        """Variants and sizes of dynamic trees: those of sequential heads are drafted with more care, so larger too."""
        size = self.sizes.num_nodes
        return [*((variant, size) for variant in ALONE), ("sequential", 2 * size)]

    def evaluate(self) -> None:
        sizes = self.sizes
        asked = [str(path.resolve()) for path in self.args.questions]
        limit = [] if sizes.questions is None else [f"limit={sizes.questions}"]

        def evaluation(name: str, variant: str, *more: str) -> None:
            if not (self.work / f"{name}.json").is_file():
                # In fp32 all are asked, as every answer must be the same; else MT-bench alone.
                questions = asked if "dtype=float32" in more else asked[:1]
                self.training(
                    name, "evaluate", f"model={self.of(variant)}", f"heads={self.work / variant}",
                    f"prompts=[{','.join(questions)}]",
                    f"output={self.work / name}.json", f"batch_size={sizes.eval_batch}", *limit,
                    f"max_new_tokens={sizes.new_tokens}", f"max_cache_len={sizes.cache}", *more,
                )  # fmt: skip

        jobs = [
            lambda v=v: evaluation(f"eval_{v}", v, f"dtype={'float32' if v in ALONE else 'auto'}") for v in self.done()
        ] + [
            lambda v=v, n=n: evaluation(f"eval_{v}_dynamic{n}", v, "tree=dynamic", f"num_nodes={n}")
            for v, n in self.dynamic() if v in self.done()
        ]  # fmt: skip
        if "medusa1" in self.done():
            jobs += [
                lambda m=m: evaluation(f"eval_{m}", "medusa1", f"mode={m}", "temperature=0.7")
                for m in ("typical", "sampling")
            ]
        self.together(*jobs)
        self.report()

    # ---- time ----

    def time(self) -> None:
        timed = (lambda n=n, f=f: self.timed(n, f) for n, f in product(self.done(), (False, True)))
        self.together(*timed, at_once=len(self.jobs))  # each alone on its GPU
        self.report()

    def timed(self, name: str, fused: bool) -> None:
        """Batch 1, in the dtype that models run in, against plain decoding in the same decoder; phases of a step.

        fused: both with Liger's layers, `fuse_elementwise`
        """
        import torch

        from medusa_kernels.training.data import read_turns

        output = self.work / f"timed_{name}{'_fused' if fused else ''}.json"
        can_fuse = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
        if output.is_file() or (fused and not can_fuse):
            return
        taken: dict[str, list] = {}
        for row in read_turns(self.args.questions[:1]):
            taken.setdefault(row["category"], []).append(row)
        rows = [row for each in taken.values() for row in each[: self.sizes.timed_per_category]][: self.sizes.questions]
        subset = self.work / "timed.jsonl"
        subset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first = name == self.done()[0]  # transformers does not care for heads: timed once, on the original model
        self.training(
            output.stem, "evaluate", f"model={self.of(name)}", f"heads={self.work / name}", f"prompts=[{subset}]",
            "batch_size=1", f"output={output}", f"max_new_tokens={self.sizes.new_tokens}",
            f"max_cache_len={min(self.sizes.cache, 1024)}", f"transformers={int(first and not fused)}",
            f"fused={str(fused).lower()}",
        )  # fmt: skip

    # ---- report ----

    def note(self, name: str, value: dict | list) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(value))

    def read(self, path: Path) -> dict | None:
        return json.loads(path.read_text()) if path.is_file() else None

    def report(self) -> None:
        """All that there is so far."""
        import torch

        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        evaluations = {mode: self.read(self.work / f"eval_{mode}.json") for mode in ("typical", "sampling")}
        result = {
            "device": card,
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "sizes": dataclasses.asdict(self.sizes),
            "distill": self.read(self.work / "distill.json"),
            "variants": {name: self.variant(name) for name in self.args.variants if (self.work / name).is_dir()},
            "temperature_0.7": {
                mode: {"mt_bench": summary(data, "mt_bench"), "categories": categories(data)}
                for mode, data in evaluations.items() if data
            },
            "transformers_tokens_per_s": next(
                (data["transformers_tokens_per_s"] for name in self.args.variants
                 if (data := self.read(self.work / f"timed_{name}.json")) and "transformers_tokens_per_s" in data), None
            ),
            "failed": self.failed,
        }  # fmt: skip
        name = f"{card.lower().replace(' ', '-')}_medusa_smollm2.json"
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / name).write_text(json.dumps(result, indent=1) + "\n")

    def variant(self, name: str) -> dict:
        folder = self.work / name
        settings = self.read(self.work / f"settings_{name}.json") or VARIANTS[name][1]
        out: dict = {"command": VARIANTS[name][0], "settings": [s.replace(f"{self.work}/", "") for s in settings]}
        if (folder / "log.jsonl").is_file():
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            shown = [*log[:: max(1, len(log) // 24)], log[-1]]
            keys = [key for key in log[-1] if key.startswith("head") or key in ("step", "kl")]
            curve = [{key: row[key] for key in keys} for row in shown]
            out["training"] = {"steps": log[-1]["step"] + 1, "of": log[-1]["of"], "curve": curve}
        if tree := self.read(folder / "tree.json"):
            out["search"] = {
                "tokens_per_step": tree["tokens_per_step"],
                "tokens_per_step_by_num_nodes": tree["tokens_per_step_by_num_nodes"],
                "top1": [row[0] for row in tree["head_accuracies"]],
                "top10": [sum(row[:10]) for row in tree["head_accuracies"]],
                "num_nodes": tree["num_nodes"],
            }
        if metrics := self.read(folder / "metrics.json"):
            out.update(metrics)
        for variant, size in self.dynamic():
            if variant == name and (data := self.read(self.work / f"eval_{name}_dynamic{size}.json")):
                out.setdefault("dynamic_trees", {})[size] = {"mt_bench": summary(data, "mt_bench")}
        if data := self.read(self.work / f"eval_{name}.json"):
            out["evaluation"] = {
                "mt_bench": summary(data, "mt_bench"), "all": summary(data, None), "categories": categories(data),
                "left_out": data["left_out"],
                **{key: data["config"][key] for key in ("dtype", "max_new_tokens", "batch_size")},
            }  # fmt: skip
        for key, suffix in (("timed", ""), ("timed_fused", "_fused")):
            if data := self.read(self.work / f"timed_{name}{suffix}.json"):
                out[key] = {
                    **{each: data["all"][each] for each in ("answers", "plain", "medusa", "speedup")},
                    "overhead": overhead(data["all"]),
                    "phases_us": data["phases_us"],
                    "categories": {
                        category: {
                            "tokens_per_s": row["medusa"]["tokens_per_s"],
                            "speedup": row["speedup"],
                            "overhead": overhead(row),
                        }
                        for category, row in data["categories"].items()
                    },
                    **{each: data["config"][each] for each in ("dtype", "max_new_tokens")},
                }
        return out


MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def categories(data: dict) -> dict:
    return {
        name: {
            "answers": row["answers"], "identical": row["identical"],
            "tokens_per_step": row["medusa"]["tokens_per_step"], "repeated_4gram_share": row["repeated_4gram_share"],
        }
        for name, row in data["categories"].items()
    }  # fmt: skip


def overhead(row: dict) -> float:
    """A step with a tree, in steps of plain decoding."""
    return row["medusa"]["ms_per_step"] / row["plain"]["ms_per_step"]


def summary(data: dict, group: str | None) -> dict:
    """Of MT-bench's categories, or all: every step of every request counts alike."""
    rows = [row for name, row in data["categories"].items() if group is None or name in MT_BENCH]
    tokens, steps, fours = (
        sum(row["medusa"]["tokens"] for row in rows), sum(row["medusa"]["request_steps"] for row in rows),
        sum(row["four_grams"] for row in rows),
    )  # fmt: skip
    return {
        "answers": sum(row["answers"] for row in rows),
        "identical": sum(row["identical"] for row in rows),
        "tokens_per_step": tokens / max(steps, 1),
        "repeated_4gram_share": sum(row["repeated_4gram_share"] * row["four_grams"] for row in rows) / max(fours, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("distill", "train", "evaluate", "time")
    parser.add_argument("--stage", nargs="+", choices=stages, default=stages)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of training prompts")
    parser.add_argument("--questions", type=Path, nargs="+", required=True, help="JSONL to evaluate on, MT-bench first")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "medusa_smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="for the JSON and the heads")
    parser.add_argument("--pack", type=Path, help="folder for the answers in files of at most 14 MiB")
    parser.add_argument("--data", type=Path, help="folder with packed answers to train on")
    parser.add_argument("--heads", type=Path, help="folder with heads_*.tar, of an earlier run, to evaluate")
    parser.add_argument("--distill-seconds", type=float, default=180)
    parser.add_argument("--train-seconds", type=float, default=180)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=[v for v in VARIANTS if v != "hard"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args()
    began = time.monotonic()
    run = Run(args)
    run.prepare()
    if args.data:
        run.unpack()
    if args.heads:
        run.unpack_heads()
    for stage in stages:
        if stage in args.stage:
            getattr(run, stage)()
            print(f"{stage}: {time.monotonic() - began:.0f} s since the start", flush=True)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
