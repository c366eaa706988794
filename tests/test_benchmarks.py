"""The benchmarks' arithmetic, inputs and contenders, on a CPU and tiny cases: everything but the times."""

import json
import sys
import types
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_acceptance
import bench_attention
import bench_compaction
import common
import run as run_benchmarks

from medusa_kernels import TokenTree

L2 = 1 << 16
CPU = torch.device("cpu")
H100 = common.Limits("NVIDIA H100 80GB HBM3", "2.11", "3.6", 3.09, 780.0, 1.3, 50 << 20)


def inputs_of(bench, case, dtype=torch.float32):
    return bench.make_inputs(case, common.Pool(bench.pool_numel([case], L2), CPU, dtype), L2)


# ---- counts ----


@pytest.mark.parametrize(
    "name, floor_us",
    [
        ("mha_b1_1k", 5.8), ("mha_b1_4k", 22), ("mha_b1_16k", 87), ("mha_b8_2k", 90), ("gqa_b1_1k", 1.5),
        ("gqa_b1_8k", 11), ("gqa_b1_32k", 44), ("gqa_b8_4k", 45), ("gqa_b32_2k", 91), ("q70_b1_16k", 44),
        ("small_b1_1k", 0.3),
    ],
)  # fmt: skip
def test_attention_floors(name, floor_us):
    """The table's floors, from the limits they were computed with."""
    case = bench_attention.TABLE[name]
    decimals = 1 if floor_us < 10 else 0
    assert round(H100.floor_us(case.num_bytes, case.flops), decimals) == floor_us


def test_attention_counts_by_hand():
    case = bench_attention.parse_case("gqa_b1_1k")
    assert case.num_bytes == 2 * (1024 + 64) * 8 * 128 * 2 == 4_456_448
    assert case.flops == 4 * 64 * 1088 * 32 * 128
    assert bench_attention.parse_case("gqa_b1_1k/fp8").num_bytes == 4_456_448 // 2
    # The root at position 1024 sees positions 1025 - 256 .. 1024: 255 of the prefix.
    assert bench_attention.parse_case("gqa_b1_1k/window256").keys == 255 + 64


@pytest.mark.parametrize(
    "name, floor_us",
    [("greedy_b1_v32000", 1.3), ("typical_b1_v128256", 5.3), ("greedy_b8_v128256", 42), ("typical_b32_v128256", 170)],
)
def test_acceptance_floors(name, floor_us):
    case = bench_acceptance.TABLE[name]
    assert H100.floor_us(case.num_bytes, case.flops) == pytest.approx(floor_us, rel=0.02)


def test_compaction_floor():
    assert H100.floor_us(bench_compaction.TABLE["mha_b1"].num_bytes, 0) == pytest.approx(1.7, rel=0.02)


def test_sets_are_cold():
    assert common.num_sets(17_825_792, 50 << 20) * 17_825_792 >= 3 * (50 << 20)
    assert common.num_sets(1 << 30, 50 << 20) == 2


def test_table_is_of_64_nodes_and_medusas_tree():
    assert len(bench_attention.TABLE) == 11 and all(c.nodes == 64 for c in bench_attention.TABLE.values())
    assert torch.equal(bench_attention.tree_for(64).parents, TokenTree.preset("mc_sim_7b_63").parents)
    for nodes in (1, 2, 26, 256):
        assert bench_attention.tree_for(nodes).size == nodes


def test_changes():
    case = bench_attention.parse_case("gqa_b1_8k/L32768/B64/ragged/T16/D256/G7/paged16/heads_first")
    assert (case.batch, case.heads, case.heads_kv, case.nodes, case.head_dim) == (64, 56, 8, 16, 256)
    assert case.block_size == 16 and case.ragged and case.heads_first and not case.recorded
    assert sorted(case.lengths)[::63] == [100, 32768] and len(set(case.lengths)) == 64
    assert case.capacity % 64 == 0 and case.capacity >= 32768 + 16
    for names in bench_attention.SETS.values():
        assert [bench_attention.parse_case(name).name for name in names] == names
    with pytest.raises(ValueError, match="'T'"):
        bench_attention.parse_case("gqa_b1_8k/T")
    with pytest.raises(ValueError, match="nothing"):
        bench_attention.parse_case("nothing")


# ---- contenders against the reference ----

ATTENTION_CASES = [*bench_attention.TINY, bench_attention.parse_case("tiny_gqa_ragged/heads_first")]


@pytest.mark.parametrize("contender", ["ours", "eager", "sdpa", "flex"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_attention_contenders(case, contender):
    inputs = inputs_of(bench_attention, case)
    if case.block_size and contender != "ours":
        with pytest.raises(common.Unsupported, match="block table"):
            bench_attention.CONTENDERS[contender](inputs)
        return
    prepared = bench_attention.CONTENDERS[contender](inputs)
    assert len(prepared.calls) == common.num_sets(case.num_bytes, L2) > 1
    for i in (0, 1, len(prepared.calls) - 1):  # each set's call reads that set
        error, right = prepared.check(i)
        assert right, error
    assert not torch.equal(prepared.calls[0](), prepared.calls[1]())


def test_folded_sdpa():
    """The rows are folded right: torch's CPU kernel stands in for the one that a GPU is asked for."""
    inputs = inputs_of(bench_attention, bench_attention.TINY[1])
    assert bench_attention._sdpa_folded(inputs, "FLASH_ATTENTION").check(0)[1]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_mask(case):
    inputs = inputs_of(bench_attention, case)
    parents, depths = inputs.tree.parents.tolist(), inputs.tree.depths.tolist()
    for b, length in enumerate(case.lengths):
        for node in range(case.nodes):
            line, at = set(), node
            while at >= 0:
                line.add(at)
                at = parents[at]
            for slot in range(inputs.mask.shape[-1]):
                seen = slot < length or slot - length in line
                if seen and case.window:
                    position = slot if slot < length else length + depths[slot - length]
                    seen = position > length + depths[node] - case.window
                assert bool(inputs.mask[b, node, slot]) == seen


def test_wrong_contender_is_not_timed():
    """One key too many of 16384 is found; a contender that mixes its sets up is, too."""
    inputs = inputs_of(bench_attention, bench_attention.TINY[0])
    prepared = bench_attention.eager(inputs)
    calls = [prepared.calls[0]] * len(prepared.calls)
    mixed = bench_attention._prepared(inputs, calls)
    result = common.measure("case", "mixed", lambda: mixed, common.measure_limits(CPU), 1, 1, CPU)
    assert result.status == "wrong" and result.us is None

    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 1, 64, 128), torch.randn(2, 1, 1, 16385, 128)
    bias = torch.zeros(1, 1, 1, 16385)
    right, wrong = (bench_attention.eager_attention(q, k[:, :, :n], v[:, :, :n], bias[..., :n]) for n in (16384, 16385))
    assert common.relative_error(wrong, right) > bench_attention.tolerance(torch.bfloat16, False)


def test_broken_contender_is_reported():
    def broken():
        raise RuntimeError("no such kernel\nmore")

    result = common.measure("case", "broken", broken, common.measure_limits(CPU), 1, 1, CPU)
    assert (result.status, result.note, result.us) == ("failed", "RuntimeError: no such kernel", None)


def test_no_mask_contenders_are_checked_without_a_mask():
    inputs = inputs_of(bench_attention, bench_attention.TINY[1])
    tail = [length + inputs.case.nodes for length in inputs.case.lengths]
    bias = torch.zeros(len(tail), 1, 1, max(tail))
    for b, n in enumerate(tail):
        bias[b, ..., n:] = -torch.inf
    dense = [
        lambda i=i: bench_attention.eager_attention(*bench_attention._dense(inputs, i), bias)
        for i in range(len(inputs.q))
    ]
    prepared = bench_attention._no_mask_prepared(inputs, dense)
    assert not prepared.same_work and prepared.check(1)[1]
    assert not bench_attention._no_mask_prepared(inputs, bench_attention.eager(inputs).calls).check(1)[1]


@pytest.mark.parametrize("nodes", [5, 33, 64])
def test_packed_words(nodes):
    mask = torch.rand(2, nodes, nodes) < 0.5
    words = bench_attention.packed_words(mask)
    assert words.dtype == torch.uint16 and words.shape == (2, nodes, 2 * -(-nodes // 32))
    for column in range(nodes):
        bit = (words[..., column // 16].int() >> column % 16) & 1
        assert torch.equal(bit.bool(), mask[..., column])


def attend_blocks(q, k, v, blocks, keys, mask):
    """What FlashInfer's documents say of its arguments, for one request: q [T, H, D], mask [T, keys]."""
    k, v = (x[blocks.long()].flatten(0, 1)[:keys].repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


class FakeWrapper:
    def __init__(self, workspace, layout, backend="fa2", use_tensor_cores=False):
        assert (layout, backend) == ("NHD", "fa2")

    def plan(self, rows, first, blocks, last, heads, heads_kv, dim, block_size, *, custom_mask, **dtypes):
        assert custom_mask.dtype == torch.bool
        self.rows, self.first, self.blocks, self.last, self.mask = rows, first, blocks, last, custom_mask
        self.block_size = block_size

    def run(self, q, kv):
        out, at = torch.empty_like(q), 0
        for b in range(len(self.last)):
            begin, end = self.first[b : b + 2].tolist()
            keys = (end - begin - 1) * self.block_size + int(self.last[b])
            rows = slice(int(self.rows[b]), int(self.rows[b + 1]))
            nodes = rows.stop - rows.start
            mask = self.mask[at : at + nodes * keys].view(nodes, keys)
            out[rows] = attend_blocks(q[rows], *kv, self.blocks[begin:end], keys, mask)
            at += nodes * keys
        assert at == self.mask.numel()
        return out


class FakeDecodeWrapper(FakeWrapper):
    def plan(self, first, blocks, last, *rest, **dtypes):
        keys = (first.diff() - 1) * rest[-1] + last
        mask = torch.ones(int(keys.sum()), dtype=torch.bool)
        super().plan(torch.arange(len(last) + 1), first, blocks, last, *rest, custom_mask=mask, **dtypes)


def fake_xqa(q, k, v, table, keys, out, scratch, semaphores, heads_kv, block_size, *, q_seq_len, mask):
    assert keys.dtype == torch.uint32 and k.shape[1] == block_size
    if q_seq_len == 1:  # [B, beams, H, D], no mask
        assert mask is None and q.dim() == 4
        q, out, mask = q.unsqueeze(1), out.unsqueeze(1), torch.ones(len(q), 1, 2, dtype=torch.uint16)
    assert mask.dtype == torch.uint16
    for b in range(q.shape[0]):
        total = int(keys[b, 0])
        columns = torch.arange(q_seq_len)
        tail = ((mask[b].int()[:, columns // 16] >> (columns % 16)) & 1).bool()
        whole = torch.cat([torch.ones(q_seq_len, total - q_seq_len, dtype=torch.bool), tail], 1)
        out[b, 0] = attend_blocks(q[b, 0], k, v, table[b], total, whole)


TREES = [c for c in bench_attention.TINY if not c.window]
SINGLE = [replace(c, name=f"{c.name}/T1", nodes=1) for c in TREES]


@pytest.mark.parametrize(
    "case, contender",
    [*product(TREES + SINGLE, ["flashinfer_fa2", "xqa"]), *((case, "flashinfer_decode") for case in SINGLE)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_flashinfer_is_called_as_documented(case, contender, monkeypatch):
    fake = types.ModuleType("flashinfer")
    fake.BatchPrefillWithPagedKVCacheWrapper, fake.xqa = FakeWrapper, fake_xqa
    fake.BatchDecodeWithPagedKVCacheWrapper = FakeDecodeWrapper
    monkeypatch.setattr(bench_attention, "import_peer", lambda module, device: {"flashinfer": fake}[module])
    prepared = bench_attention.CONTENDERS[contender](inputs_of(bench_attention, case))
    for i in (0, len(prepared.calls) - 1):
        error, right = prepared.check(i)
        assert right, error


def brute_force(logits, tokens, parents, mode):
    """(accept_length, last_node, next_token) of one request, node by node."""
    accepted, depth, score = [True], [0], [0.0]
    for node in range(1, len(parents)):
        parent = parents[node]
        p = logits[parent].double().softmax(0)
        if mode == "greedy":
            passes = int(tokens[node]) == int(logits[parent].argmax())
        else:
            entropy = -sum(x * torch.log(x + 1e-5) for x in p)
            threshold = min(bench_acceptance.THRESHOLD, bench_acceptance.ALPHA * float(torch.exp(-entropy)))
            passes = float(p[tokens[node]]) > threshold
        accepted.append(accepted[parent] and passes)
        depth.append(depth[parent] + 1)
        score.append(0.0 if mode == "greedy" else score[parent] + float(p[tokens[node]].log()))
    last = max((n for n in range(len(parents)) if accepted[n]), key=lambda n: (depth[n], score[n], -n))
    return depth[last], last, int(logits[last].argmax())


@pytest.mark.parametrize("mode", ["greedy", "typical"])
def test_acceptance_peers(mode):
    """On random trees of few tokens, where much is accepted; and on the benchmark's own inputs."""
    torch.manual_seed(0)
    lengths = set()
    for _ in range(40):
        size = int(torch.randint(2, 20, ()))
        tree = TokenTree.from_parents(torch.tensor([-1] + [int(torch.randint(node, ())) for node in range(1, size)]))
        logits, tokens = torch.randn(1, size, 4) * 3, torch.randint(4, (1, size))
        # Siblings of one token are one path twice, which peers order in their own ways.
        keys = list(zip(tree.parents.tolist()[1:], tokens[0, 1:].tolist()))
        if len(set(keys)) < len(keys):
            continue
        parents, paths = tree.parents.long().clamp(min=0), tree.paths.long()
        expected = brute_force(logits[0], tokens[0], tree.parents.tolist(), mode)
        lengths.add(expected[0])
        batched = bench_acceptance.batched_accept(logits, tokens, parents, paths, mode)
        assert tuple(int(x) for x in batched) == expected
        assert tuple(int(x) for x in bench_acceptance.medusa_accept(logits, tokens, paths, mode)) == expected
    assert len(lengths) > 2


def test_acceptance_inputs_accept_what_they_should():
    for case in bench_acceptance.TINY:
        inputs = inputs_of(bench_acceptance, case)
        for i in (0, len(inputs.logits) - 1):
            for b in range(case.batch):
                parents = inputs.tree.parents.tolist()
                outcome = brute_force(inputs.logits[i][b], inputs.tokens[i][b], parents, "greedy")
                assert outcome[0] == bench_acceptance.ACCEPTED
                assert outcome == brute_force(inputs.logits[i][b], inputs.tokens[i][b], parents, "typical")


@pytest.mark.parametrize("contender", ["ours", "medusa_eager", "batched_eager"])
@pytest.mark.parametrize("case", bench_acceptance.TINY, ids=lambda c: c.name)
def test_acceptance_contenders(case, contender):
    inputs = inputs_of(bench_acceptance, case)
    if contender != "ours" and (case.mode == "sampling" or (case.batch > 1 and contender == "medusa_eager")):
        with pytest.raises(common.Unsupported, match="greedy"):
            bench_acceptance.CONTENDERS[contender](inputs)
        return
    prepared = bench_acceptance.CONTENDERS[contender](inputs)
    for i in (0, len(prepared.calls) - 1):
        assert prepared.check(i) == (0.0, True)
    if case.mode != "sampling":
        accept_length, last_node, next_token = prepared.calls[0]()
        for wrong in ((accept_length, last_node, next_token + 1), (accept_length, last_node - 1, next_token)):
            assert bench_acceptance._check(inputs, 0, wrong) == (case.batch, False)


def test_argmax_is_less_work():
    prepared = bench_acceptance.argmax(inputs_of(bench_acceptance, bench_acceptance.TINY[0]))
    assert not prepared.same_work and prepared.check(0) == (0.0, True)


@pytest.mark.parametrize("contender", ["ours", "medusa", "per_layer", "indexed"])
@pytest.mark.parametrize("case", bench_compaction.TINY, ids=lambda c: c.name)
def test_compaction_peers(case, contender):
    inputs = inputs_of(bench_compaction, case)
    if case.batch > 1 and contender in ("medusa", "per_layer"):
        with pytest.raises(common.Unsupported, match="one request"):
            bench_compaction.CONTENDERS[contender](inputs)
        return
    prepared = bench_compaction.CONTENDERS[contender](inputs)
    before = inputs.kv.clone()
    for i in (0, len(prepared.calls) - 1):
        assert prepared.check(i) == (0.0, True)
        at = i * bench_compaction.TREE_SLOTS
        for row, node in enumerate(bench_compaction.PATH):
            assert torch.equal(inputs.kv[:, :, :, at + row], before[:, :, :, at + node])
    assert torch.equal(inputs.lengths, inputs.start)
    assert not bench_compaction._prepared(inputs, [lambda: None]).check(0)[1]


# ---- reports ----


def result(contender, us, **more):
    return common.Result("case", contender, "ok", us=us, error=0.0, num_bytes=3.09e6, floor_us=1.0, **more)


def test_ratios_leave_out_less_work_and_ours():
    rows = [result("ours", 2.0), result("ours_batch_invariant", 1.5), result("argmax", 1.0, same_work=False)]
    rows += [result("eager", 9.0), result("sdpa", 4.0), common.Result("case", "xqa", "wrong")]
    assert common.best_peer(rows).contender == "sdpa"
    assert rows[0].tb_s == pytest.approx(1.545) and rows[0].fraction == 0.5


def test_json_is_merged_for_one_card_alone(tmp_path):
    path = tmp_path / "x.json"
    run_benchmarks.write_json(path, "attention", [result("ours", 2.0), result("eager", 9.0)], H100)
    content = json.loads(path.read_text())
    for row in content["results"]:
        row["date"] = "2026-01-01"
    path.write_text(json.dumps(content))
    run_benchmarks.write_json(path, "attention", [result("ours", 1.0)], H100)
    rows = {r["contender"]: r for r in json.loads(path.read_text())["results"]}
    assert {name: row["us"] for name, row in rows.items()} == {"ours": 1.0, "eager": 9.0}
    assert rows["eager"]["date"] == "2026-01-01" < rows["ours"]["date"]  # a row has the date of its own run
    other = common.Limits("NVIDIA H200", "2.11", "3.6", 4.2, 780.0, 1.3, 60 << 20)
    run_benchmarks.write_json(path, "attention", [result("sdpa", 3.0)], other)
    assert [r["contender"] for r in json.loads(path.read_text())["results"]] == ["sdpa"]


def test_choice_of_cases():
    def names(text):
        return [case.name for case in run_benchmarks.choose_cases(bench_attention, text)]

    assert names("table") == list(bench_attention.TABLE)
    assert names("small*/paged16,mha_b1_1k") == ["small_b1_1k/paged16", "mha_b1_1k"]
    assert run_benchmarks.choose("ours*,eager", list(bench_attention.CONTENDERS)) == [
        "ours", "ours_append", "ours_batch_invariant", "eager",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="sdqa"):
        run_benchmarks.choose("sdqa", ["sdpa"])


@pytest.mark.parametrize(
    "op, peers", [("attention", "ours,sdpa"), ("acceptance", "ours,batched_eager"), ("compaction", "ours,medusa")]
)
def test_smoke_run(op, peers, tmp_path, capsys):
    arguments = ["--device", "cpu", "--op", op, "--peers", peers, "--out", str(tmp_path), "--quick"]
    assert run_benchmarks.main(arguments) == 0
    assert "SMOKE TEST" in capsys.readouterr().out
    rows = json.loads((tmp_path / f"cpu_{op}.json").read_text())["results"]
    assert sum(r["status"] == "ok" for r in rows) >= 3 and (tmp_path / f"cpu_{op}.png").stat().st_size > 5000


def test_readme_figures_are_those_of_the_results():
    import readme

    text = (readme.ROOT / "README.md").read_text()
    assert readme.render(text) == text, "run benchmarks/readme.py"
    assert text.count("<!-- results:") == 6


@pytest.mark.parametrize("name", ["mha_b1_4k", "gqa_b8_4k", "gqa_b1_8k/T1", "gqa_b1_8k/D256", "gqa_b1_8k/G16"])
def test_sweep_times_the_choice_among_others(name):
    import sweep_attention

    case = bench_attention.parse_case(name)
    configs = sweep_attention.variants(case, 132, 90)
    assert configs[0] == sweep_attention.chosen(case, 132, 90)
    assert len(configs) == len(set(configs)) > 4
    with sweep_attention.forced(configs[-1]):
        assert sweep_attention.chosen(case, 132, 90) == configs[-1]
    assert sweep_attention.chosen(case, 132, 90) == configs[0]


@pytest.mark.parametrize("name", ["mha_b1_4k", "gqa_b1_8k", "gqa_b1_8k/fp8", "small_b1_1k/T1"])
def test_sweep_of_splits(name):
    """Hopper's: the choice among others, all of which the kernel's plan takes."""
    import sweep_attention

    case = bench_attention.parse_case(name)
    configs = sweep_attention.splits(case, 132, 90)
    assert configs[0] == sweep_attention.chosen_splits(case, 132, 90) and len(configs) == len(set(configs)) > 4
    for config in configs:
        row_blocks = -(-case.nodes * case.heads // case.heads_kv // (64 * config.groups))
        resident = 132 * (2 if config.groups == 1 and not case.fp8 else 1)
        assert config.num_splits == 1 or case.batch * case.heads_kv * row_blocks * config.num_splits <= resident
    with sweep_attention.forced_splits(configs[-1]):
        assert sweep_attention.chosen_splits(case, 132, 90) == configs[-1]
    assert sweep_attention.chosen_splits(case, 132, 90) == configs[0]


def test_what_is_measured_outlives_a_broken_device(tmp_path, monkeypatch):
    """Results are in the file before the next contender begins."""
    make_inputs, made = bench_compaction.make_inputs, []

    def broken(*args):
        made.append(args)
        if len(made) > 1:
            raise RuntimeError("an illegal memory access was encountered")
        return make_inputs(*args)

    monkeypatch.setattr(bench_compaction, "make_inputs", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_benchmarks.main(["--device", "cpu", "--op", "compaction", "--peers", "ours", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu_compaction.json").read_text())["results"]
    assert [row["case"] for row in rows] == [bench_compaction.TINY[0].name]
