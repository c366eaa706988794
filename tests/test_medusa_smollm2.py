"""The parts of benchmarks/medusa_smollm2.py that carry data: packed answers, and the report of what there is."""

import argparse
import importlib.util
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from medusa_kernels.training.data import Answers
from medusa_kernels.training.distill import write_lines


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "benchmarks" / "medusa_smollm2.py"
    spec = importlib.util.spec_from_file_location("medusa_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(script, folder, **more):
    args = {"work": folder, "quick": True, "pack": None, "data": None, "out": folder / "out", "variants": ["medusa1"]}
    return script.Run(argparse.Namespace(**{**args, **more}))


def test_packed_answers_are_the_shards(script, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(script, "PART_BYTES", 6000)
    run = make_run(script, tmp_path / "a", pack=tmp_path / "packed")
    for name in script.FOLDERS:
        for shard in range(5):
            rows = [{"prompt": [1, 2], "answer": rng.integers(0, 50, 30).tolist()} for _ in range(40)]
            write_lines(run.work / name / f"shard-{shard:05d}.jsonl.gz", rows)
    run.note("distill", {"seconds": 1})
    run.pack()
    sizes = [path.stat().st_size for path in (tmp_path / "packed").iterdir()]
    assert len(sizes) > 3 and max(sizes) == 6000
    other = make_run(script, tmp_path / "b", data=tmp_path / "packed")
    for _ in range(2):  # a second time changes nothing
        other.unpack()
        for name in script.FOLDERS:
            before, after = (Answers.read([each.work / name], 64, 50) for each in (run, other))
            assert before.fingerprint == after.fingerprint and len(after) == 200
    with pytest.raises(FileNotFoundError, match="--data"):
        make_run(script, tmp_path / "c", data=tmp_path / "a").unpack()
    assert run.counts("greedy") == {"answers": 200, "prompt_tokens": 400, "answer_tokens": 6000}


def test_report_of_what_there_is(script, tmp_path):
    run = make_run(script, tmp_path)
    run.report()
    (path,) = (tmp_path / "out").glob("*_medusa_smollm2.json")
    assert json.loads(path.read_text())["variants"] == {}

    def category(tokens, steps, fours, share):
        return {
            "answers": 2, "identical": 1, "repeated_4gram_share": share, "four_grams": fours,
            "medusa": {"tokens": tokens, "request_steps": steps, "tokens_per_step": tokens / steps},
        }  # fmt: skip

    heads = tmp_path / "medusa1"
    heads.mkdir()
    evaluation = {
        "left_out": 0,
        "config": {"dtype": "float32", "max_new_tokens": 24, "batch_size": 2},
        "categories": {
            "writing": category(30, 10, 100, 0.1),
            "math": category(10, 10, 300, 0.5),
            "qa": category(90, 10, 600, 1.0),
        },
    }
    run.note("eval_medusa1", evaluation)
    run.note("eval_typical", evaluation)
    row = {"plain": {"ms_per_step": 2.0}, "medusa": {"ms_per_step": 3.0, "tokens_per_s": 900.0}, "speedup": 1.6}
    timed = {"all": {**row, "answers": 2}, "categories": {"math": row}, "phases_us": {}, "config": evaluation["config"]}
    run.note("timed_medusa1_fused", timed)
    log = [{"step": step, "of": 50, "loss": 1.0, "head1": 5.0 - step / 50} for step in range(50)]
    (heads / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    tree = {
        "tokens_per_step": {"joint": 2.5},
        "tokens_per_step_by_num_nodes": {"2": 1.5},
        "head_accuracies": [[0.5, 0.25, 0.125]],
        "num_nodes": 64,
    }
    (heads / "tree.json").write_text(json.dumps(tree))
    run.report()
    result = json.loads(path.read_text())
    got = result["variants"]["medusa1"]
    want = {"answers": 4, "identical": 2, "tokens_per_step": 2.0, "repeated_4gram_share": pytest.approx(0.4)}
    assert got["evaluation"]["mt_bench"] == want == result["temperature_0.7"]["typical"]["mt_bench"]
    assert got["evaluation"]["all"]["tokens_per_step"] == pytest.approx(130 / 30)
    assert got["search"]["top1"] == [0.5] and got["search"]["top10"] == [0.875]
    assert got["training"]["steps"] == 50 and got["training"]["curve"][-1] == {"step": 49, "head1": pytest.approx(4.02)}
    timed = got["timed_fused"]
    assert timed["overhead"] == 1.5 and timed["categories"]["math"] == {
        "tokens_per_s": 900.0,
        "speedup": 1.6,
        "overhead": 1.5,
    }
    assert "timed" not in got and "evaluation" in got and result["failed"] == []


def test_jobs_side_by_side_spread_over_the_gpus(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "count_gpus", lambda: 2)
    run = make_run(script, tmp_path)
    both = threading.Barrier(2, timeout=20)
    seen = []

    def job(command, env, **_):
        seen.append((command[-1], env["CUDA_VISIBLE_DEVICES"]))
        if command[-1] != "last":
            both.wait()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", job)
    run.together(*(lambda i=i: run.training(f"job{i}", str(i)) for i in range(2)))
    assert sorted(gpu for _, gpu in seen) == ["0", "1"] and run.jobs == [0, 0]
    run.training("last", "last")
    assert seen[-1] == ("last", "0")
