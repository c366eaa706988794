"""benchmarks/step.py: its model, its steps and its arithmetic, on a CPU and a tiny model; and the choice of a size."""

import argparse
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from torch._dynamo.utils import counters
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import step

from medusa_kernels import TokenTree

CPU = torch.device("cpu")
TINY = step.MODELS["tiny"]
H100 = common.Limits("NVIDIA H100 80GB HBM3", "2.11", "3.6", 3.09, 780.0, 1.3, 50 << 20)
interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="the interpreter is off where a GPU is there"
)


@pytest.fixture(scope="module")
def model():
    return step.Model(TINY, CPU, torch.float32)


def context(model, batch=2, length=20):
    return step.Context(model, batch, length, 16)


def tree_step(model, nodes, rows=None, **options):
    tree = step.tree_for(nodes)
    made = step.Step(context(model), tree, rows or 2 * nodes, **options)
    made.make_drafts_right()
    return made


# ---- the steps ----


@pytest.mark.parametrize("mode", ["greedy", "typical"])
@pytest.mark.parametrize("nodes", [4, 9, 16])
def test_a_tree_step_says_what_plain_steps_say(model, nodes, mode):
    made = tree_step(model, nodes, mode=mode)
    result = made.run()
    accepted = min(step.ACCEPTED, made.tree.max_depth)
    assert result.accepted.accept_length.tolist() == [accepted] * 2
    assert made.cache_seqlens.tolist() == [20 + accepted + 1] * 2
    plain = step.Step(context(model), TokenTree.chain(0), 2, plain=True)
    texts = []
    for _ in range(accepted + 1):
        texts.append(plain.forward()[:, 0].argmax(-1))
        plain.tokens[:, 0] = texts[-1]
        plain.cache_seqlens += 1
    assert result.new_tokens[:, : accepted + 1].tolist() == torch.stack(texts, 1).tolist()
    assert made.root.tolist() == texts[-1].tolist()
    again = made.run()
    assert again.report.tolist() == result.report.tolist()  # it starts at the same place


def test_every_candidate_of_plain_decoding_agrees(model):
    candidates = step.plain_candidates(context(model))
    assert len(candidates) == 12 and {made.rows for made in candidates} == {2, 16, 64}
    want = candidates[0].forward()
    for made in candidates:
        torch.testing.assert_close(made.forward(), want, rtol=1e-3, atol=1e-3)
        made.run()
        assert made.root.tolist() == want[:, 0].argmax(-1).tolist()
        assert made.cache_seqlens.tolist() == [21, 21]
        assert made.wrong(want[:, 0]) is None


def test_padding_rows_change_nothing(model):
    torch.testing.assert_close(tree_step(model, 9, 32).forward(), tree_step(model, 9).forward(), rtol=1e-3, atol=1e-3)


def test_what_is_wrong_is_found(model):
    made = tree_step(model, 9)
    logits = made.forward()[:, 0].clone()
    assert made.wrong(logits) is None
    assert "logits" in made.wrong(logits.flip(1))
    assert "logits" in made.wrong(torch.full_like(logits, float("nan")))
    made.tokens[:, 1:] = (made.tokens[:, 1:] + 1) % TINY.vocab
    assert "accepted" in made.wrong(logits)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "tree"])
def test_parts_build_up_to_the_step(model, plain, monkeypatch):
    made = step.Step(context(model), TokenTree.chain(0), 2, plain=True) if plain else tree_step(model, 9)
    called: list[str] = []
    for name in ("tree_attention", "rms_norm", "rotary", "silu_mul", "accept_candidates", "verify_step"):
        real = getattr(step, name)
        monkeypatch.setattr(
            step, name, lambda *a, _name=name, _real=real, **k: (called.append(_name), _real(*a, **k))[1]
        )
    ran = []
    for parts in range(1, 6):
        called.clear()
        made.run(parts)
        ran.append(set(called))
    attention, rest = {"tree_attention"}, {"tree_attention", "rms_norm", "rotary", "silu_mul"}
    last = [rest, rest] if plain else [rest | {"accept_candidates"}, rest | {"verify_step"}]
    assert ran == [set(), attention, rest, *last]


def test_gating_is_of_the_matmuls_where_it_is_fused(model, monkeypatch):
    x, weight = torch.randn(3, 64), torch.randn(192, 64)
    want = F.silu(x @ weight[:96].T) * (x @ weight[96:].T)
    called: list[str] = []

    def fused(x, weight):
        called.append("fused")
        return step.gated(x, weight)

    real, apart = step.silu_mul, step.WithSiluMul(F.linear)
    monkeypatch.setattr(step, "silu_mul", lambda gate_up: (called.append("silu_mul"), real(gate_up))[1])
    made = tree_step(model, 9)
    logits = made.forward()
    for call, before, whole in ((fused, ["fused"], ["fused"]), (apart, [], ["silu_mul"])):
        torch.testing.assert_close(call(x, weight), want, rtol=1e-4, atol=1e-4)
        monkeypatch.setitem(model.chosen, ("gated", 18, weight.shape), call)
        for parts in (1, 2, 3):
            called.clear()
            got = made.forward(parts)
            assert called == TINY.layers * (before if parts < 3 else whole)
        torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-3)


# ---- the choice of matmuls ----


def test_the_fastest_that_is_right_is_chosen(monkeypatch):
    calls: list[str] = []

    def by(name, x, weight):
        calls.append(name)
        if name == "raises":
            raise RuntimeError("no kernel\nfor this")
        return F.linear(x, weight) * (1.1 if name == "wrong" else float("nan") if name == "nan" else 1.0)

    def timed(functions, device, replays):
        """A call of `slow` takes 9 µs, and so on, and what comes before them 20."""
        times = []
        for function in functions:
            calls.clear()
            function()
            times.append(20 + sum(us_of[name] for name in calls))
        return times

    us_of = {"slow": 9.0, "wrong": 1.0, "raises": 1.0, "nan": 1.0, "fast: b": 5.0, "fast: a": 4.0, "slower": 12.0}
    monkeypatch.setattr(step, "linears", lambda rows, device, out: {name: partial(by, name) for name in us_of})
    monkeypatch.setattr(step, "times_us", timed)
    said: list[str] = []
    chooser = step.Model(TINY, CPU, torch.float32, said.append)
    chooser.choose(3)
    shapes = [[128, 64], [64, 64], [192, 64], [64, 96], [101, 64]]
    assert [(row["rows"], row["shape"]) for row in chooser.matmuls] == [(3, shape) for shape in shapes]
    assert [row["op"] for row in chooser.matmuls] == [*step.OPS, "linear"]
    for row in chooser.matmuls:
        assert row["best"] == "fast: a" and row["candidates_us"] == {"slow": 9.0, "fast": 4.0, "slower": 12.0}
    about = "matmul [128, 64] of 3 rows:"
    assert said[:3] == [f"{about} wrong left out, off by 1.0e-01",
                        f"{about} raises left out, RuntimeError: no kernel",
                        f"{about} nan left out, off by inf"]  # fmt: skip
    assert len(said) == 3 * len(shapes)


def test_a_step_uses_what_was_chosen_once(monkeypatch):
    asked: list[int] = []
    called: list[tuple[int, ...]] = []

    def linears(rows, device, out):
        asked.append(rows)
        return {"only": lambda x, weight: (called.append((len(x), *weight.shape)), F.linear(x, weight))[1]}

    monkeypatch.setattr(step, "linears", linears)
    chooser = step.Model(TINY, CPU, torch.float32)
    for length in (20, 30):
        made = step.Step(context(chooser, length=length), step.tree_for(4), 8)
        assert asked == [8] * 5  # the second context's are the first's
    called.clear()
    made.forward()
    shapes = [(8, 128, 64), (8, 64, 64), (8, 192, 64), (8, 64, 96)]
    assert called == [*shapes, *shapes, (8, 101, 64)] and len(asked) == 5


def test_matmuls_of_a_gpu(monkeypatch):
    monkeypatch.setattr(step, "compiled", lambda call, attempt: call)
    monkeypatch.setattr(step, "suitable", lambda quacks, rows, out, device: quacks[:1])
    cuda = torch.device("cuda")
    found = ["cublas", "cublaslt", f"quack: {step.QUACKS[0]}"]
    assert list(step.linears(128, cuda, 64)) == found
    assert list(step.gateds(128, cuda, 64)) == [*found, f"quack fused: {step.GATED_QUACKS[0]}"]
    compiled = [*found[:2], "inductor: attempt 1", found[2]]
    assert list(step.linears(16, cuda, 64)) == compiled
    compiled[3:3] = ["inductor: attempt 2", "inductor: attempt 3"]
    assert list(step.linears(1, cuda, 64)) == compiled
    fused = [f"inductor fused: attempt {i}" for i in (1, 2, 3)]
    assert list(step.gateds(1, cuda, 64)) == [*compiled, *fused, f"quack fused: {step.GATED_QUACKS[0]}"]
    for candidates in (step.linears, step.gateds):
        assert list(candidates(129, cuda, 64)) == found[:2]
        assert list(candidates(1, CPU, 64)) == ["F.linear"]
    assert all(quack.width % 32 == 0 for quack in step.GATED_QUACKS)
    assert [out for out in (4096, 6144, 12288, 28672) if step.Quack(96, 2).suits(64, out, 132)] == [12288]
    wide = [step.Quack(224, 2), step.Quack(224, 2, pingpong=True)]
    assert [[quack.suits(rows, 28672, 132) for quack in wide] for rows in (64, 65)] == [[True, True], [True, False]]
    state = ["before"]

    def preferred(library=None):
        if library is not None:
            state.append(library)
        return state[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    assert torch.equal(step.linears(1, cuda, 4)["cublaslt"](x, weight), F.linear(x, weight))
    with pytest.raises(RuntimeError):
        step.blas_linear("cublas", x, weight.T)
    assert state == ["before", "cublaslt", "before", "cublas", "before"]


# ---- the kernels between ----


@interpreter
def test_kernels_equal_pytorch():
    rows, hidden = 3, 48
    residual, x, weight = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.rand(hidden)
    for added in (None, x):
        want_residual, got_residual = residual.clone(), residual.clone()
        want = step.rms_norm(want_residual, added, weight)
        got = torch.empty_like(want)
        step.rms_norm_kernel[(rows,)](
            got_residual, added, weight, got, hidden, step.EPS, HAS_X=added is not None, BLOCK=64
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got_residual, want_residual)

    heads, dim, lengths, depths = 5, 16, torch.tensor([4, 9]).int(), torch.tensor([0, 1, 1]).int()
    table, qkv = torch.randn(16, dim), torch.randn(8, 7 * dim)  # two heads and two rows are left alone
    want = qkv.clone()
    step.rotary(want, heads, table, lengths, depths)
    for block in (8, 2):
        got = qkv.clone()
        step.rotary_kernel[(6, triton.cdiv(heads, block))](
            got, table, lengths, depths, 3, got.stride(0), HEADS=heads, BLOCK_HEADS=block, HALF=dim // 2
        )
        torch.testing.assert_close(got, want)
    assert torch.equal(want[6:], qkv[6:]) and torch.equal(want[:, 5 * dim :], qkv[:, 5 * dim :])
    assert not torch.equal(want[:6, : 5 * dim], qkv[:6, : 5 * dim])

    gate_up = torch.randn(rows, 2 * 1030)
    got = torch.empty(rows, 1030)
    step.silu_mul_kernel[(rows, 2)](gate_up, got, 1030, BLOCK=1024)
    torch.testing.assert_close(got, step.silu_mul(gate_up))


COMPILE = """
import step
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

constants = {
    step.rms_norm_kernel: {"HAS_X": True, "BLOCK": 4096},
    step.rotary_kernel: {"HEADS": 40, "BLOCK_HEADS": 8, "HALF": 64},
    step.silu_mul_kernel: {"BLOCK": 1024},
}
types = {"table_ptr": "*fp32", "cache_seqlens_ptr": "*i32", "depths_ptr": "*i32", "eps": "fp32"}
for arch, early in ((80, False), (90, True)):
    for kernel, chosen in constants.items():
        chosen = chosen | {"EARLY": early}
        kinds = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
        source = ASTSource(kernel, signature=kinds | dict.fromkeys(chosen, "constexpr"), constexprs=chosen)
        options = {"num_warps": 8, "launch_pdl": early}
        ptx = compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
        wait, store = ptx.find("griddepcontrol.wait"), ptx.find("st.global")
        print("waits" if 0 < wait < store else "compiled" if wait < 0 else "waits too late")
"""


def test_kernels_compile():
    """In a process of its own, as the interpreter must be off."""
    path = os.pathsep.join((str(Path(step.__file__).parent), str(Path(step.__file__).parents[1])))
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["compiled"] * 3 + ["waits"] * 3, done.stderr[-2000:]


def test_rotary_turns_relative_positions():
    """Scores of rotated q and k depend on the distance alone."""
    table = context(SimpleNamespace(shape=TINY, head=torch.zeros(1, 1)), 1, 40).rotary
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))  # no score near 0, or near another

    def score(i: int, j: int) -> float:
        rotated = []
        for x, at in ((q, i), (k, j)):
            row = x.clone().view(1, 16)
            step.rotary(row, 1, table, torch.tensor([at]).int(), torch.tensor([0]).int())
            rotated.append(row[0])
        return float(rotated[0] @ rotated[1])

    assert score(30, 21) == pytest.approx(score(15, 6), rel=1e-4)
    assert score(30, 21) != pytest.approx(score(30, 20), rel=1e-2)


# ---- counts and derived numbers ----


@pytest.mark.parametrize("name, floor_us", [("vicuna_7b", 4300), ("llama3_8b", 4884)])
def test_weights(name, floor_us):
    assert 2 * step.MODELS[name].weights / H100.read_tb_s * 1e-6 == pytest.approx(floor_us, rel=0.01)


def measured(nodes, us, batch=1, **parts):
    rest = dict.fromkeys(step.PARTS, 0.0) | parts
    return step.Measured("tiny", batch, 20, nodes, "greedy", us, rest, "best", {"best": us}, None)


def drafted(nodes, us, batch=1):
    return step.Drafted("tiny", batch, nodes, us)


def test_overheads_by_hand():
    results = [
        measured(1, 100.0, matmuls=90.0, attention=10.0),
        measured(64, 110.0, matmuls=92.0, attention=13.0, acceptance=4.0, compaction=1.0),
        measured(16, 50.0, batch=4),  # without plain decoding to compare with
    ]
    (row,) = step.overheads(results, [drafted(64, 40.0), drafted(64, 50.0, batch=4), drafted(16, 60.0)])
    assert row["draft_us"] == 40 and row["speed_up_with_drafts"] == pytest.approx(row["tokens"] / 1.5)
    assert step.overheads(results)[0] == row | {"draft_us": None, "speed_up_with_drafts": None}
    assert row["overhead"] == pytest.approx(1.1)
    assert row["parts_percent"] == pytest.approx(
        {"matmuls": 2, "attention": 3, "rest": 0, "acceptance": 4, "compaction": 1}
    )
    assert row["operators_percent"] == pytest.approx(8)
    assert row["published_speed_up"]["Medusa-1, Vicuna-7B, greedy"] == pytest.approx(2.32 / 1.1)
    assert row["tokens"] == pytest.approx(2.3845, abs=1e-3) and row["speed_up"] == pytest.approx(row["tokens"] / 1.1)


def test_best_sizes():
    results = [measured(1, 100.0), measured(16, 101.0), measured(64, 102.0), measured(128, 140.0),
               measured(1, 100.0, batch=4), measured(16, 150.0, batch=4), measured(64, 400.0, batch=4)]  # fmt: skip
    rows = {row["batch"]: row for row in step.best_sizes(results)}
    assert (rows[1]["nodes"], rows[4]["nodes"]) == (64, 16)
    assert rows[1]["speed_up"] == pytest.approx(2.3845 / 1.02, abs=1e-3)


def test_results_are_merged(tmp_path):
    path = tmp_path / "results" / "card_step.json"
    first = [{"model": "tiny", "rows": rows, "shape": [8, 4], "best": "cublas"} for rows in (1, 16)]  # as of old
    step.merge_results(path, [measured(1, 100.0), measured(16, 120.0)], first, [drafted(16, 9.0)], H100)
    second = [
        {"op": op, "model": name, "rows": 16, "shape": [8, 4], "best": "inductor"}
        for name, op in (("tiny", "linear"), ("tiny", "gated"), ("vicuna_7b", "linear"))
    ]
    drafts = [drafted(16, 5.0), drafted(64, 6.0)]
    every = step.merge_results(path, [measured(16, 110.0), measured(64, 130.0)], second, drafts, H100)
    assert [(r.nodes, r.us) for r in every] == [(1, 100.0), (16, 110.0), (64, 130.0)]
    content = json.loads(path.read_text())
    assert len(content["steps"]) == 3 and len(content["overheads"]) == 2 and len(content["best_sizes"]) == 1
    assert content["matmuls"] == [second[2], first[0], second[1], second[0]]
    assert [row["us"] for row in content["drafts"]] == [row["draft_us"] for row in content["overheads"]] == [5.0, 6.0]
    del content["matmuls"], content["drafts"]  # as files were before matmuls had a choice
    path.write_text(json.dumps(content))
    assert len(step.merge_results(path, [measured(1, 90.0)], first, [], H100)) == 3
    assert json.loads(path.read_text())["matmuls"] == first
    other = common.Limits("another card", *list(vars(H100).values())[1:])
    assert len(step.merge_results(path, [measured(1, 90.0)], [], [], other)) == 1


def test_smoke_run(tmp_path, capsys):
    arguments = ["--device", "cpu", "--batches", "2", "--lengths", "20", "--nodes", "4,9", "--out", str(tmp_path)]
    assert step.main(arguments) == 0
    said = capsys.readouterr().out
    assert "SMOKE TEST" in said and "WRONG" not in said
    content = json.loads((tmp_path / "cpu_step.json").read_text())
    assert [(row["batch"], row["nodes"]) for row in content["steps"]] == [(2, 1), (2, 4), (2, 9)]
    for row in content["steps"]:
        assert sum(row["parts_us"].values()) == pytest.approx(row["us"]) and row["us"] > 0
    assert len(content["steps"][0]["candidates_us"]) == 12
    assert sorted({row["rows"] for row in content["matmuls"]}) == [2, 8, 16, 18, 32, 64]
    assert len(content["matmuls"]) == 30
    assert [(row["batch"], row["nodes"]) for row in content["drafts"]] == [(2, 4), (2, 9)]
    for row, drafting in zip(content["overheads"], content["drafts"]):
        assert row["draft_us"] == drafting["us"] > 0 and row["speed_up_with_drafts"] < row["speed_up"]
    for row in content["matmuls"]:
        # Less the norm's own time, which on a busy CPU may have taken as long: no sign to rely on.
        assert row["model"] == "tiny" and row["best"] == "F.linear" and list(row["candidates_us"]) == ["F.linear"]
        assert math.isfinite(row["candidates_us"]["F.linear"])
    assert (tmp_path / "cpu_step.png").stat().st_size > 1000


def test_a_wrong_step_fails_the_run(monkeypatch, capsys):
    monkeypatch.setattr(step.Step, "wrong", lambda self, logits: None if self.plain else "accepted [0]")
    assert step.main(["--device", "cpu", "--batches", "1", "--nodes", "4"]) == 1
    assert "WRONG, accepted [0]" in capsys.readouterr().out


def test_bad_arguments():
    for arguments in (["--models", "gpt"], ["--nodes", "1,16"], ["--batches", "0"]):
        with pytest.raises(SystemExit):
            step.main(["--device", "cpu", *arguments])
    with pytest.raises(argparse.ArgumentTypeError, match="gpt"):
        step.models("tiny,gpt")


@pytest.mark.gpu
def test_gpu_compiled_matmuls(device, monkeypatch):
    """Compiled once a shape and number of rows, and right in a step's graph."""
    real = step.linears
    monkeypatch.setattr(step, "suitable", lambda quacks, rows, out, device: [])
    monkeypatch.setattr(step, "linears", lambda *args: {"inductor": real(*args)["inductor: attempt 1"]})
    with torch.inference_mode():
        made = step.Model(step.Shape(512, 3, 8, 2, 64, 768, 5000), device, torch.bfloat16)
        tree = step.tree_for(16).to(device)
        steps = [step.Step(step.Context(made, 1, length, 16), tree, 16) for length in (300, 400)]
        graphs = counters["stats"]["unique_graphs"]
        logits = [each.forward()[:, 0].clone() for each in steps]
        assert all(us > 0 for us in step.times_us([each.run for each in steps], device, 2))
        assert counters["stats"]["unique_graphs"] == graphs
        step.compiled(step.linear, 2)(torch.ones(16, 512, device=device), torch.ones(64, 512, device=device))
        assert counters["stats"]["unique_graphs"] == graphs + 1
        monkeypatch.setattr(made, "linear", F.linear)
        monkeypatch.setattr(made, "gated", lambda x, weight, rest: step.gated(x, weight))
        for each, got in zip(steps, logits):
            each.cache_seqlens.copy_(each.context.start)
            assert common.relative_error(got, each.forward()[:, 0]) < 0.1


@pytest.mark.gpu
def test_gpu_run(device, monkeypatch):
    """Right in bf16, captured, and timed, at head dims and groups of the real models."""
    monkeypatch.setattr(step, "compiled", lambda call, attempt: call)  # minutes of compiling
    for shape in (TINY, step.Shape(512, 3, 4, 4, 128, 768, 1000), step.Shape(512, 3, 8, 2, 64, 768, 5000)):
        args = SimpleNamespace(models=["tiny"], batches=[1, 4], lengths=[300], nodes=[16, 26, 64, 128], mode="greedy",
                               replays=3)  # fmt: skip
        before = step.MODELS["tiny"]
        step.MODELS["tiny"] = shape
        try:
            with torch.inference_mode():
                results, matmuls, drafts, wrong = step.measure_all(args, H100, device, print)
        finally:
            step.MODELS["tiny"] = before
        assert wrong == 0 and len(results) == 10
        assert len(drafts) == 8 and all(d.us > 0 for d in drafts)
        assert all(r.us > 0 and r.floor_us > 0 for r in results)
        assert {row["rows"] for row in matmuls} == {1, 4, 16, 26, 32, 64, 104, 112, 128, 256, 512}
        for row in matmuls:
            compiled = ["inductor"] if row["rows"] <= 16 else []
            compiled += ["inductor fused"] if row["op"] == "gated" and row["rows"] == 1 else []
            names = [name for name in row["candidates_us"] if not name.startswith("quack")]
            assert names == ["cublas", "cublaslt", *compiled]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 100])
def test_gpu_quack_gates(device, rows):
    pytest.importorskip("quack")
    with torch.inference_mode():
        for out in (16384, 22016, 28672):
            x = torch.randn(rows, 512, device=device, dtype=torch.bfloat16)
            weight = torch.randn(out, 512, device=device, dtype=torch.bfloat16)
            for quack in step.suitable(step.GATED_QUACKS, rows, out, device):
                assert common.relative_error(quack.gated(x, weight), step.gated(x, weight)) < 0.01, quack


# ---- the size of a tree ----


def test_expected_tokens_by_hand():
    accuracies = torch.tensor([[0.5, 0.2], [0.4, 0.1]])
    tree = TokenTree.from_choices([[0], [1], [0, 0], [1, 1]])
    assert tree.expected_tokens(accuracies).tolist() == pytest.approx([1, 1.5, 1.7, 1.9, 1.92])
    assert TokenTree.chain(0).expected_tokens(accuracies).tolist() == [1]


def test_expected_tokens_is_the_mean_over_independent_heads():
    accuracies = torch.tensor([[0.6, 0.2, 0.1], [0.5, 0.2, 0.1]], dtype=torch.float64)
    tree = TokenTree.search(accuracies, 8)
    generator = torch.Generator().manual_seed(1)
    weights = torch.cat([accuracies, 1 - accuracies.sum(1, keepdim=True)], 1)
    ranks = torch.multinomial(weights, 20000, replacement=True, generator=generator)  # of the right token, 3: none
    parents, node_ranks = tree.parents.tolist(), tree.ranks.tolist()
    right = torch.ones(tree.size, 20000, dtype=torch.bool)
    for node in range(1, tree.size):
        right[node] = right[parents[node]] & (ranks[int(tree.depths[node]) - 1] == node_ranks[node])
    mean = right.sum(0).double().mean()
    assert float(mean) == pytest.approx(float(tree.expected_tokens(accuracies)[-1]), abs=0.02)


def test_best_size():
    accuracies = step.HEAD_ACCURACIES
    flat = dict.fromkeys((1, 16, 64, 128), 10.0)
    assert TokenTree.best_size(accuracies, flat) == 128  # more nodes for nothing
    assert TokenTree.best_size(accuracies, {n: float(n) for n in flat}) == 1  # each node as dear as a step
    assert TokenTree.best_size(accuracies, {1: 10.0, 16: 10.5, 64: 10.9, 128: 11.5}) == 64
    step_us = {1: 9.0, 2: 11.0, 7: 13.0, 30: 18.0}
    brute = {
        n: float(TokenTree.search(accuracies, n).expected_tokens(accuracies)[-1]) / us for n, us in step_us.items()
    }
    assert TokenTree.best_size(accuracies, step_us) == max(brute, key=brute.get)


def test_best_size_bad_input():
    accuracies = torch.tensor([[0.5, 0.2]])
    for step_us in ({}, {4: 0.0}, {4: -1.0, 8: 2.0}, {4: float("nan")}):
        with pytest.raises(ValueError, match="step_us"):
            TokenTree.best_size(accuracies, step_us)
    with pytest.raises(ValueError, match="step_us: expected sizes"):
        TokenTree.best_size(accuracies, {0: 1.0})
    with pytest.raises(ValueError, match="num_nodes"):  # there are no more than two paths
        TokenTree.best_size(accuracies, {4: 1.0})
    with pytest.raises(TypeError, match="head_accuracies"):
        TokenTree.best_size([[0.5]], {1: 1.0})
    tree = TokenTree.from_choices([[0], [0, 0]])
    with pytest.raises(ValueError, match="head_accuracies: expected at least 2 heads"):
        tree.expected_tokens(accuracies)
    with pytest.raises(ValueError, match="expected_tokens: expected one tree"):
        TokenTree.best_first(torch.rand(2, 2, 2), 3).expected_tokens(accuracies)
