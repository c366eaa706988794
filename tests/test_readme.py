"""README.md keeps its word: its Python runs, in order, as one program, and the files that it points to are there."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = README.read_text()
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(snippets) >= 4 and len(snippets) == text.count("```py")
    names: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets:
        lines_above = text[: snippet.start(1)].count("\n")  # so that a traceback names the line of README.md
        exec(compile("\n" * lines_above + snippet[1], README, "exec"), names)


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README.read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, missing


def load_readme_script():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_medusa_table(tmp_path, monkeypatch):
    """What is there is shown, what was not measured is not."""
    script = load_readme_script()
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.medusa_table() == "**Medusa heads**: not measured yet."
    summary = {"answers": 20, "identical": 19, "tokens_per_step": 2.125, "repeated_4gram_share": 0.25}
    timed = {"plain": {"tokens_per_s": 700.0}, "medusa": {"tokens_per_s": 1400.0}, "speedup": 2.0}
    timed |= {"overhead": 1.2, "categories": {"writing": {"overhead": 1.25, "tokens_per_s": 600.0, "speedup": 1.5}}}
    timed |= {"answers": 8, "max_new_tokens": 256, "dtype": "bfloat16"}
    data = {
        "device": "Card", "date": "2026-01-01", "torch": "2.11", "failed": [], "transformers_tokens_per_s": None,
        "sizes": {"num_nodes": 64}, "distill": None, "temperature_0.7": {},
        "variants": {
            "medusa1": {
                "search": {"top1": [0.5, 0.25]}, "timed": timed,
                "dynamic_trees": {n: {"mt_bench": {**summary, "tokens_per_step": 2 + n / 128}} for n in (64, 128)},
                "timed_fused": {**timed, "medusa": {"tokens_per_s": 2500.0}, "speedup": 2.25},
                "evaluation": {
                    "dtype": "float32", "max_new_tokens": 128, "batch_size": 10,
                    "mt_bench": summary, "all": summary, "categories": {"writing": summary},
                },
            },
            "medusa2": {"perplexity": {"original": 2.0, "trained": 2.01}},
        },
    }  # fmt: skip
    path = tmp_path / f"{script.CARD}_medusa_smollm2.json"
    path.write_text(json.dumps(data))
    table = script.medusa_table()
    row = "| 2.12 | 2.50 (64 nodes); 3.00 (128 nodes) | 19 of 20 | 0.50 / 0.25 | 1400 | 2.00x | 2500 | 2.25x |"
    assert f"| Medusa-1, heads that see the root {row}" in table
    assert "20 answers of up to 128 tokens in batches of 10" in table
    assert "8 answers of up to 256 tokens, bfloat16" in table
    assert "| Medusa-2, heads that see the root | - | - | - | - | - | - | - | - |" in table
    assert (
        "perplexity on held-out text by +0.50%" in table
        and "| writing | 20 | 19 | 2.12 | 25% | 1.25 | 600 | 1.50x |" in table
    )
    assert "| all | 20 | 19 | 2.12 | 25% | 1.20 | 2500 | 2.25x |" in table
    assert "generate" not in table and "temperature 0.7" not in table
    data.update(transformers_tokens_per_s=41.5, distill={"seconds": 90.0, "folders": {"a": {"answer_tokens": 1500000}}})
    data["temperature_0.7"] = {"typical": {"mt_bench": summary}, "sampling": {"mt_bench": summary}}
    path.write_text(json.dumps(data))
    table = script.medusa_table()
    assert "`generate`: 42 tokens/s. Trained on 1.5 M answer tokens, distilled in 90 s." in table
    assert "typical 2.12, sampling 2.12" in table


def test_operator_table(tmp_path, monkeypatch):
    """Ours beside the best peer that does the same work, or in parentheses one that does less; changed cases apart."""
    script = load_readme_script()
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def row(case, contender, us, same_work=True):
        return {"case": case, "contender": contender, "us": us, "same_work": same_work, "floor_us": 1.0}

    data = {
        "card": {"device": "Card", "torch": "2.11", "triton": "3.6"}, "date": "2026-01-01",
        "limits": {"read_tb_s": 3.0, "matmul_tflop_s": 700.0, "launch_us": 1.0},
        "results": [
            row("a", "ours", 2.0), row("a", "earlier", 3.0) | {"date": "2025-12-31"},
            row("a", "slow", 9.0), row("a", "fast", 5.0), row("a", "less", 1.0, False),
            row("b", "ours", 4.0), row("b", "less", 6.0, False), row("b", "absent", None),
            row("a/T1", "ours", 5.0), row("a/T1", "fast", 4.0), row("a/T2", "ours", 6.0) | {"date": "2025-12-31"},
        ],
    }  # fmt: skip
    (tmp_path / f"{script.CARD}_op.json").write_text(json.dumps(data))
    table, changed = script.operator_table("op"), script.operator_table("op", changed=True)
    assert "| a | 1.0 | 2.0 | 50% | 5.0 fast | 2.50x |\n| b | 1.0 | 4.0 | 25% | (6.0 less) | (1.50x) |" in table
    assert "a/T1" not in table and "| a |" not in changed
    assert "| a/T1 | 1.0 | 5.0 | 20% | 4.0 fast | 0.80x |" in changed
    assert "| a/T2 (2025-12-31) | 1.0 |" in changed
