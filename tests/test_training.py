"""Every stage of training on a tiny model that has learnt a repetitive language, through the command line."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_kernels import TokenTree
from medusa_kernels.decoding import NoDrafter, TreeDecoder, demo, load_model
from medusa_kernels.decoding.heads import MedusaHeads, SequentialHeads
from medusa_kernels.decoding.medusa import (
    DynamicMedusaDrafter,
    DynamicSequentialDrafter,
    MedusaDrafter,
    SequentialDrafter,
    load_drafter,
    load_tree,
)
from medusa_kernels.training import medusa1
from medusa_kernels.training.__main__ import COMMANDS, OUT_OF_TIME, main
from medusa_kernels.training.config import DistillConfig, Medusa1Config, Medusa2Config, SearchConfig, load_config
from medusa_kernels.training.data import Answers, read_jsonl, read_turns
from medusa_kernels.training.distill import whole_message
from medusa_kernels.training.evaluate import repeated_four_grams
from medusa_kernels.training.medusa1 import heads_loss, teachers_rows
from medusa_kernels.training.medusa2 import Medusa2, perplexity
from medusa_kernels.training.search import head_accuracies, joint_search, tokens_per_step, tree_choices
from medusa_kernels.training.trainer import ramp_and_cosine

WORDS = 200
SPECIAL = ["<unk>", "<end>", "<user>", "<bot>"]
VOCAB = len(SPECIAL) + WORDS
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
ON_CPU = ["device=cpu", "dtype=float32"]


def sentence(rng) -> list[int]:
    """Words follow one another in a ring of seven, with a jump to another ring now and then."""
    words, ring, place = [], int(rng.integers(28)), int(rng.integers(7))
    for _ in range(int(rng.integers(20, 40))):
        words.append(len(SPECIAL) + ring * 7 + place)
        place = (place + 1) % 7
        if rng.random() < 0.1:
            ring = (ring * 5 + 3) % 28
    return words


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, its tokenizer and prompts."""
    work = tmp_path_factory.mktemp("training")
    vocab = {token: i for i, token in enumerate(SPECIAL + [f"W{i}" for i in range(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=["<user>", "<bot>"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=None, eos_token_id=1,
        pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        rows = []
        for _ in range(16):
            text = sentence(rng)
            rows.append(([2, *text[:6], 1, 3, *text[6:], 1] + [1] * 64)[:48])
        ids = torch.tensor(rows)
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.5, "the tiny model has not learnt its language"
    model.save_pretrained(work / "model")
    fast.save_pretrained(work / "model")
    prompts = [" ".join(f"W{word - len(SPECIAL)}" for word in sentence(rng)[:6]) for _ in range(96)]
    rows = [{"prompt": prompt} for prompt in prompts]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"turns": [prompts[i], prompts[i + 1]], "category": "ab"[i // 4]} for i in range(8)]
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return work


def distill_arguments(work, output, *more):
    return [
        "distill", *ON_CPU, f"model={work}/model", f"prompts={work}/prompts.jsonl", f"output={output}", "batch_size=24",
        "max_prompt_tokens=32", "max_new_tokens=32", "temperature=0.8", "shard_size=32", *more,
    ]  # fmt: skip


def train_arguments(work, stage, output, *more):
    return [
        stage, *ON_CPU, f"model={work}/model", f"data={work}/answers", f"output={output}", "num_heads=3", "holdout=24",
        "batch_size=12", "epochs=8", "learning_rate=1e-2", "log_every=1", *more,
    ]  # fmt: skip


def log_of(folder):
    return list(read_jsonl(folder / "log.jsonl"))


@pytest.fixture(scope="module")
def answers(work):
    assert main(distill_arguments(work, work / "answers")) == 0
    return Answers.read([work / "answers"], 256, VOCAB)


@pytest.fixture(scope="module")
def heads(work, answers):
    assert main(train_arguments(work, "medusa1", work / "heads")) == 0
    arguments = ["search", *ON_CPU, f"model={work}/model", f"data={work}/answers", f"heads={work}/heads"]
    assert main([*arguments, "holdout=24", "num_nodes=16", "top_k=5"]) == 0
    return work / "heads"


def test_distilled_answers_are_the_models_own(work, answers):
    assert sorted(path.name for path in (work / "answers").iterdir()) == [
        "distill.json", "shard-00000.jsonl.gz", "shard-00001.jsonl.gz", "shard-00002.jsonl.gz",
    ]  # fmt: skip
    model, tokenizer = load_model(str(work / "model"))
    rows = [row for i in range(3) for row in read_jsonl(work / "answers" / f"shard-0000{i}.jsonl.gz")]
    for row, asked in zip(rows, read_turns([work / "prompts.jsonl"])):
        assert tokenizer.decode(row["prompt"]).split()[1:-2] == asked["turns"][0].split()
        assert 1 <= len(row["answer"]) <= 32 and 1 not in row["answer"][:-1]
    assert len({tuple(row["answer"]) for row in rows}) > 80
    # Likely under the model, as its own draws are, and less so under another one's eyes: its untrained self.
    sequences = [row["prompt"] + row["answer"] for row in rows[:16]]
    torch.manual_seed(1)
    assert perplexity(model, sequences) < 0.2 * perplexity(LlamaForCausalLM(model.config), sequences)


def test_greedy_distillation_is_greedy(work, tmp_path):
    arguments = distill_arguments(work, tmp_path, "temperature=0", "limit=6", "samples=2", "shard_size=5")
    assert main(arguments) == 0
    rows = [row for i in range(3) for row in read_jsonl(tmp_path / f"shard-0000{i}.jsonl.gz")]
    model, _ = load_model(str(work / "model"))
    want = TreeDecoder(model, NoDrafter()).generate([row["prompt"] for row in rows[:6]], 32).tokens
    assert [row["answer"] for row in rows] == want * 2


def test_distillation_resumes(work, answers, tmp_path):
    shutil.copytree(work / "answers", tmp_path / "answers")
    arguments = distill_arguments(work, tmp_path / "answers")
    kept = tmp_path / "answers" / "shard-00000.jsonl.gz"
    before = kept.read_bytes() + gzip.compress(b"\n")
    kept.write_bytes(before)  # a shard that is there is left as it is
    (tmp_path / "answers" / "shard-00001.jsonl.gz").unlink()
    assert main([*arguments, "max_seconds=0"]) == OUT_OF_TIME
    assert main(arguments) == 0
    assert kept.read_bytes() == before
    for name in ("shard-00001.jsonl.gz", "shard-00002.jsonl.gz"):
        assert (tmp_path / "answers" / name).read_bytes() == (work / "answers" / name).read_bytes()


def test_distillation_refuses_to_mix_settings(work, answers, tmp_path, capsys):
    shutil.copytree(work / "answers", tmp_path / "answers")
    assert main([*distill_arguments(work, tmp_path / "answers"), "temperature=0.5"]) == 2
    assert "temperature: " in capsys.readouterr().err
    assert main([*distill_arguments(work, tmp_path / "answers"), "limit=5"]) == 2
    assert "prompts: " in capsys.readouterr().err
    assert main([*distill_arguments(work, tmp_path / "b"), "max_prompt_tokens=3"]) == 2
    assert "max_prompt_tokens: no prompt of at most 3" in capsys.readouterr().err


def test_prompts_from_the_model_itself(work, tmp_path):
    arguments = ["prompts", *ON_CPU, f"model={work}/model", f"output={tmp_path}/own.jsonl", "count=30", "batch_size=20"]
    assert main([*arguments, "max_new_tokens=24", "temperature=1.0"]) == 0
    rows = read_turns([tmp_path / "own.jsonl"])
    assert 1 <= len(rows) <= 30 and len({row["prompt"] for row in rows}) == len(rows)
    # The language's messages have six words, of one ring or two.
    assert sum(len(row["prompt"].split()) == 6 for row in rows) > len(rows) / 2


def test_whole_messages_alone_are_kept(work):
    model, tokenizer = load_model(str(work / "model"))
    assert whole_message(model, tokenizer, [5, 6, 7, 8, 1]) == "W1 W2 W3 W4"
    for tokens in ([5, 6, 7, 8], [5, 6, 1], [5, 6, 7, 8, 5, 6, 7, 8, 1], [1]):
        assert whole_message(model, tokenizer, tokens) is None


def test_batches_name_the_right_tokens(answers):
    train, held = answers.split(24, 0)
    assert sorted([*train, *held]) == list(range(len(answers))) and len(held) >= 24
    batch = answers.batch(train[:5], 3)
    length = batch.ids.shape[1]
    place = 0
    for row, index in enumerate(train[:5]):
        tokens = answers.tokens[answers.starts[index] : answers.starts[index + 1]].tolist()
        assert batch.ids[row, : len(tokens)].tolist() == tokens
        for t in range(int(answers.answers[index]) - 1, len(tokens) - 1):
            assert int(batch.at[place]) == row * length + t
            want = [tokens[t + k + 1] if t + k + 1 < len(tokens) else -100 for k in range(4)]
            assert batch.labels[:, place].tolist() == want
            place += 1
    assert place == len(batch.at)


def test_an_epoch_is_every_sequence_once(answers):
    train, _ = answers.split(24, 0)
    epochs = [answers.batches(train, 12, seed=1, epoch=epoch) for epoch in (0, 0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == sorted(train) and max(map(len, batches)) == 12
    assert all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[1]))
    assert not all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[2]))


def test_answers_to_one_prompt_stay_on_one_side():
    sequences = [([2, i % 7], [5, i, 1]) for i in range(70)]
    data = Answers(sequences, 16)
    train, held = data.split(5, 3)
    assert {i % 7 for i in train}.isdisjoint({i % 7 for i in held}) and len(held) == 10
    for holdout, message in ((70, "holdout: expected 0..69"), (65, "holdout: 65 leaves nothing")):
        with pytest.raises(ValueError, match=message):
            data.split(holdout, 3)
    with pytest.raises(ValueError, match="max_length = 3"):
        Answers(sequences, 3)


@pytest.mark.parametrize("kind", ["shared", "own", "root", "soft"])
def test_heads_loss(monkeypatch, kind):
    """Against the definition, and in chunks the same, gradients included."""
    torch.manual_seed(0)
    lm_head, embedding = torch.randn(2, 11, 8)
    heads = MedusaHeads(
        3, 2, lm_head.repeat(3, 1, 1) if kind == "own" else lm_head, embedding if kind in ("root", "soft") else None
    )
    with torch.no_grad():
        for parameter in (heads.weight, heads.bias, *([heads.token_weight] if heads.sees_root else [])):
            parameter.normal_(0, 0.3)
    hidden, labels = torch.randn(23, 8), torch.randint(0, 11, (4, 23))
    for k in range(1, 4):  # two answers, of 12 and 11 positions
        labels[k, 12 - k : 12] = labels[k, 23 - k :] = -100
    soft = 0.4 if kind == "soft" else 0.0
    logits, own = heads(hidden, labels[:1]), (hidden @ lm_head.T).softmax(-1)
    want = hard = 0
    for k in range(1, 4):
        right = [n for n in range(23) if labels[k, n] >= 0]
        log_p = logits[k - 1][right].log_softmax(-1)
        each = -log_p.gather(1, labels[k, right].unsqueeze(1)).mean()
        blurred = -(own[[n + k for n in right]] * log_p).sum(-1).mean()  # what the model says k places on
        want = want + 0.8**k * ((1 - soft) * each + soft * blurred)
        hard = hard + 0.8**k * each
    grads = torch.autograd.grad(want, list(heads.parameters()))
    for chunk in (5, 4096):
        monkeypatch.setattr(medusa1, "CHUNK", chunk)
        teacher = teachers_rows(hidden, lm_head, labels[0]) if soft else None
        loss, each = heads_loss(heads, hidden, labels, 0.8, teacher, soft)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(sum(0.8 ** (k + 1) * each[f"head{k + 1}"] for k in range(3)), hard.detach())
        torch.testing.assert_close(torch.autograd.grad(loss, list(heads.parameters())), grads)
    nothing, _ = heads_loss(heads, hidden, torch.full_like(labels, -100), 0.8, hidden, 0.5 if soft else 0.0)
    assert nothing.item() == 0.0


def test_heads_loss_in_mixed_precision():
    """Logits, their softmax and the gradient are bfloat16 there: as near to float32 as that allows."""
    torch.manual_seed(0)
    lm_head = torch.randn(300, 64) * 0.2
    heads = MedusaHeads(2, 1, lm_head)
    hidden, labels = torch.randn(50, 64), torch.randint(0, 300, (3, 50))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            teacher = teachers_rows(hidden, lm_head, labels[0])
            loss, _ = heads_loss(heads, hidden, labels, 0.8, teacher, 0.5)
        results.append((loss.item(), torch.autograd.grad(loss, heads.weight)[0]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    assert (results[1][1] - results[0][1]).norm() < 0.02 * results[0][1].norm()


def test_medusa1_learns(work, answers, heads):
    log = log_of(heads)
    first, last = (np.mean([row["loss"] for row in rows]) for rows in (log[:3], log[-3:]))
    assert last < 0.5 * first
    assert [row["step"] for row in log] == list(range(log[-1]["of"]))
    # The most frequent token is what can be said without looking at the text.
    held = answers.split(24, 0)[1]
    batch = answers.batch(held, 3)
    accuracies = json.loads((heads / "tree.json").read_text())["head_accuracies"]
    for head in range(3):
        labels = batch.labels[head + 1]
        labels = labels[labels >= 0]
        unigram = float((labels == labels.mode().values).float().mean())
        assert accuracies[head][0] > 3 * unigram, (head, accuracies[head][0], unigram)


def test_the_model_itself_is_not_trained(work, heads):
    model, _ = load_model(str(work / "model"))
    state = torch.load(heads / "checkpoint.pt", weights_only=True)
    assert set(state["parameters"]) == {"heads.weight", "heads.bias", "heads.token_weight"}
    saved = MedusaHeads.from_pretrained(heads, model)
    assert torch.equal(saved.weight, state["parameters"]["heads.weight"])


@pytest.mark.parametrize("kind", ["tree.json", "dynamic"])
def test_decoding_with_trained_heads(work, answers, heads, kind):
    model, _ = load_model(str(work / "model"))
    drafter = load_drafter(heads, model)
    if kind == "dynamic":
        drafter = DynamicMedusaDrafter(drafter.heads, num_nodes=16, top_k=5)
    prompts = [answers.sequence(i)[: answers.answers[i]] for i in answers.split(24, 0)[1][:6]]
    want = TreeDecoder(model, NoDrafter()).generate(prompts, 32)
    decoder = TreeDecoder(model, drafter)
    got = decoder.generate(prompts, 32)
    assert got.tokens == want.tokens and got.stats.tokens_per_step > 1.5
    assert [decoder.generate([prompt], 32).tokens[0] for prompt in prompts] == want.tokens
    for options in ({"mode": "typical", "temperature": 0.7}, {"mode": "sampling", "temperature": 0.7, "seed": 1}):
        assert decoder.generate(prompts, 32, **options).stats.tokens_per_step > 1.3


@pytest.mark.gpu
def test_all_stages_on_gpu(work, tmp_path):
    """With the defaults there: bfloat16, mixed precision, CUDA graphs. Each in a process of its own, as users do."""
    common, data = f"model={work}/model", [f"data={tmp_path}/answers", "holdout=24"]
    train = [common, *data, "epochs=8", "batch_size=12", "learning_rate=1e-2", "num_heads=3"]
    search = ["search", common, *data, "num_nodes=16", "top_k=5"]
    evaluate = ["evaluate", common, f"prompts={work}/questions.jsonl", "max_new_tokens=16", "max_cache_len=128"]
    evaluate.append("dtype=float32")
    sizes = ["batch_size=24", "max_prompt_tokens=32", "max_new_tokens=32", "temperature=0.8"]
    waves = (
        [
            ["prompts", common, f"output={tmp_path}/own.jsonl", "count=40", "batch_size=20", "temperature=1.0"],
            ["distill", common, f"prompts=[{work}/prompts.jsonl]", f"output={tmp_path}/answers", *sizes],
        ],
        [
            ["medusa1", *train, f"output={tmp_path}/heads"],
            ["medusa1", *train, f"output={tmp_path}/sequential", "sequential=true", "soft=0", "shared_lm_head=false"],
            ["medusa2", *train, f"output={tmp_path}/medusa2", "learning_rate=5e-4", "heads_lr_multiple=20"],
        ],
        [[*search, f"heads={tmp_path}/{name}"] for name in ("heads", "sequential")],
        [
            [*evaluate, f"heads={tmp_path}/heads", f"output={tmp_path}/heads.json", "transformers=1"],
            [*evaluate, f"heads={tmp_path}/heads", f"output={tmp_path}/dynamic.json", "tree=dynamic"],
            [*evaluate, f"heads={tmp_path}/sequential", f"output={tmp_path}/sequential.json"],
            [*evaluate, f"heads={tmp_path}/sequential", f"output={tmp_path}/both.json", "tree=dynamic"],
        ],
    )
    for wave in waves:  # side by side: most of the time is start-up
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "medusa_kernels.training", *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for arguments in wave
        ]  # fmt: skip
        for arguments, process in zip(wave, started):
            text, _ = process.communicate()
            assert process.returncode == 0, f"{arguments}: {text[-3000:]}"
    for name in ("heads", "dynamic", "sequential", "both"):
        out = json.loads((tmp_path / f"{name}.json").read_text())["all"]
        assert out["identical"] == out["answers"] == 16 and out["medusa"]["tokens_per_step"] > 1.5
    perplexities = json.loads((tmp_path / "medusa2" / "metrics.json").read_text())["perplexity"]
    assert perplexities["trained"] < 1.1 * perplexities["original"]


@pytest.mark.parametrize("stage", ["medusa1", "medusa2"])
def test_resumed_equals_uninterrupted(work, answers, tmp_path, stage):
    more = ["epochs=2", *(["stage1=0.3", "lora_rank=2", "lora_dropout=0.1"] if stage == "medusa2" else [])]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(train_arguments(work, stage, whole, *more)) == 0
    steps = log_of(whole)[-1]["of"]
    runs = 1
    while main([*train_arguments(work, stage, parts, *more), "max_seconds=0"]) == OUT_OF_TIME:
        runs += 1
        if runs == 3:  # the rest in one go, after steps that were logged but came too late for the checkpoint
            with (parts / "log.jsonl").open("a") as log:
                log.write('{"step": 2, "loss": 0}\n')
            assert main(train_arguments(work, stage, parts, *more)) == 0
            break
    assert runs == 3 and steps > 6
    losses = [[row["loss"] for row in log_of(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    files = ["medusa_heads.safetensors"] + (["model/model.safetensors"] if stage == "medusa2" else [])
    for name in files:
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_training_by_the_clock(work, answers, tmp_path):
    """The rates follow the clock and have fallen when it ends; what is done is not gone on with."""
    arguments = train_arguments(work, "medusa1", tmp_path, "epochs=1000", "seconds=2")
    assert main([*arguments, "max_seconds=0.5"]) == OUT_OF_TIME
    assert main(arguments) == 0
    log = log_of(tmp_path)
    rates = [row["learning_rates"][0] for row in log]
    assert 2 < len(log) < log[-1]["of"] and max(rates) > 5e-3 and rates[-1] < 1e-3
    assert main(arguments) == 0
    assert log_of(tmp_path) == log


def test_heads_that_do_not_see_the_root(work, answers, heads, tmp_path):
    assert main(train_arguments(work, "medusa1", tmp_path, "sees_root=false")) == 0
    last, roots = (np.mean([row["loss"] for row in log_of(folder)[-3:]]) for folder in (tmp_path, heads))
    assert not (MedusaHeads.from_pretrained(tmp_path, load_model(str(work / "model"))[0])).sees_root
    assert last < 0.6 * log_of(tmp_path)[0]["loss"] and roots < last


def test_medusa2_learns_and_keeps_the_model(work, answers, heads, tmp_path):
    arguments = train_arguments(
        work,
        "medusa2",
        tmp_path,
        "learning_rate=5e-4",
        "heads_lr_multiple=20",
        "epochs=6",
        "lora_rank=4",
        "heads_weight=0.05",
    )
    assert main(arguments) == 0
    log = log_of(tmp_path)
    first, last = (np.mean([row["head1"] for row in rows]) for rows in (log[:3], log[-3:]))
    assert last < 0.6 * first
    stage1 = [row for row in log if row["step"] < 0.3 * row["of"]]
    assert all(row["kl"] == 0 and row["learning_rates"][1] == 0 for row in stage1)
    assert log[-1]["kl"] > 0
    before, after = load_model(str(work / "model"))[0], load_model(str(tmp_path / "model"))[0]
    changed = [name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert changed and not any("embed" in name or "norm" in name for name in changed)
    held = answers.split(24, 0)[1]
    sequences = [answers.sequence(i) for i in held]
    want = {"original": perplexity(before, sequences), "trained": perplexity(after, sequences)}
    got = json.loads((tmp_path / "metrics.json").read_text())["perplexity"]
    assert got == pytest.approx(want, rel=1e-4) and got["trained"] < 1.03 * got["original"]
    decoder = TreeDecoder(after, MedusaDrafter(MedusaHeads.from_pretrained(tmp_path, after), load_tree(heads)))
    prompts = [sequence[:8] for sequence in sequences[:4]]
    got = decoder.generate(prompts, 24)
    assert got.tokens == TreeDecoder(after, NoDrafter()).generate(prompts, 24).tokens
    assert got.stats.tokens_per_step > 1.5


def test_medusa2_loss(work, answers):
    """Against the definition, on two models, and no gradient reaches the original."""
    peft = pytest.importorskip("peft")
    original, _ = load_model(str(work / "model"))
    model, _ = load_model(str(work / "model"))
    heads = MedusaHeads.from_model(model.requires_grad_(False), 3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    batch = answers.batch(np.arange(5), 3)
    objective = Medusa2(adapted, heads, 0.8, 0.2, stage1=0.3, soft=0.5)
    out = objective(*batch, 0.3)
    p, q = (m(batch.ids).logits.flatten(0, 1)[batch.at].softmax(-1).detach() for m in (original, adapted))
    torch.testing.assert_close(out["kl"], (p * (p.log() - q.log())).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    hidden, teacher = (medusa1.last_hidden(m, batch.ids, batch.at).detach() for m in (model, original))
    teacher = teachers_rows(teacher, original.lm_head.weight, batch.labels[0])  # the original is the heads' teacher too
    want = heads_loss(heads, hidden, batch.labels, 0.8, teacher, 0.5)[0]
    torch.testing.assert_close(out["loss"].detach(), out["kl"] + 0.2 * want)
    out["loss"].backward()
    grads = {name for name, p in objective.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"heads.weight", "heads.bias"} < grads and all("lora" in name for name in grads if "heads" not in name)
    objective.zero_grad()
    objective(*batch, 0.29)["loss"].backward()  # the first stage trains the heads alone
    assert {name for name, p in objective.named_parameters() if p.grad is not None} == {"heads.weight", "heads.bias"}


def test_sequential_heads_learn_more(work, answers, heads, tmp_path):
    assert main(train_arguments(work, "medusa1", tmp_path, "sequential=true")) == 0
    last, medusas = (np.mean([row["loss"] for row in log_of(folder)[-3:]]) for folder in (tmp_path, heads))
    assert last < 0.8 * medusas
    arguments = ["search", *ON_CPU, f"model={work}/model", f"data={work}/answers", f"heads={tmp_path}"]
    assert main([*arguments, "holdout=24", "num_nodes=16", "top_k=5"]) == 0
    found, medusas = (json.loads((f / "tree.json").read_text())["tokens_per_step"]["joint"] for f in (tmp_path, heads))
    assert found > medusas
    model, _ = load_model(str(work / "model"))
    drafter = load_drafter(tmp_path, model)
    assert isinstance(drafter, SequentialDrafter) and isinstance(drafter.heads, SequentialHeads)
    prompts = [answers.sequence(i)[: answers.answers[i]] for i in answers.split(24, 0)[1][:6]]
    want = TreeDecoder(model, NoDrafter()).generate(prompts, 32).tokens
    for each in (drafter, DynamicSequentialDrafter(drafter.heads, num_nodes=16, top_k=5)):
        got = TreeDecoder(model, each).generate(prompts, 32)
        assert got.tokens == want and got.stats.tokens_per_step > 1.5


def test_training_goes_on_from_given_heads(work, answers, heads, tmp_path, capsys):
    assert main(train_arguments(work, "medusa1", tmp_path, f"heads={heads}", "epochs=1")) == 0
    assert log_of(tmp_path)[0]["loss"] < 0.7 * log_of(heads)[0]["loss"]
    assert main([*train_arguments(work, "medusa1", tmp_path / "b", f"heads={heads}"), "num_heads=2"]) == 2
    assert "num_heads: " in capsys.readouterr().err


def test_broken_checkpoints(work, answers, heads, tmp_path, capsys):
    arguments = train_arguments(work, "medusa1", tmp_path)
    good = (heads / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    for broken in (b"", b"nonsense", good[: len(good) // 2]):
        path.write_bytes(broken)
        assert main(arguments) == 2
        assert "checkpoint.pt: not readable as a checkpoint" in capsys.readouterr().err
    state = torch.load(heads / "checkpoint.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "optimizer"}, path)
    assert main(arguments) == 2
    assert "not readable as a checkpoint" in capsys.readouterr().err
    torch.save({**state, "parameters": {"heads.weight": torch.zeros(2)}}, path)
    assert main(arguments) == 2
    assert "holds other parameters" in capsys.readouterr().err
    path.write_bytes(good)
    for change, key in (("learning_rate=1e-3", "learning_rate"), ("max_length=20", "max_length")):
        assert main([*arguments, change]) == 2
        assert f"{key}: " in capsys.readouterr().err
    assert main(arguments) == 0  # done already: the heads are saved again
    assert (tmp_path / "medusa_heads.safetensors").read_bytes() == (heads / "medusa_heads.safetensors").read_bytes()


def test_broken_data(work, tmp_path):
    shard = tmp_path / "shard-00000.jsonl"
    with pytest.raises(ValueError, match="data: no shard"):
        Answers.read([tmp_path], 64, VOCAB)
    for row, message in (
        ("{", "line 2: not readable as JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"prompt": [1]}', "line 2: answer: expected token ids"),
        ('{"prompt": [], "answer": [1]}', "line 2: prompt: expected token ids"),
        ('{"prompt": [1], "answer": [999]}', r"line 2: answer: expected token ids 0\.\.203"),
        ('{"prompt": [1], "answer": "ab"}', "line 2: answer"),
    ):
        shard.write_text('{"prompt": [1, 2], "answer": [3, 4, 5]}\n' + row + "\n")
        with pytest.raises(ValueError, match=message):
            Answers.read([tmp_path], 64, VOCAB)
    gz = tmp_path / "prompts.jsonl.gz"
    gz.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"prompts\.jsonl\.gz: not readable"):
        read_turns([gz])
    (tmp_path / "p.jsonl").write_text('{"turns": []}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: expected `prompt`"):
        read_turns([tmp_path / "p.jsonl"])
    with pytest.raises(ValueError, match="no such file"):
        read_turns([tmp_path / "q.jsonl"])


def test_accuracies_and_search():
    ranks = torch.tensor([[0, 0], [0, 1], [0, 3], [1, 0], [3, 0], [2, -1], [0, 0], [3, -1]])
    accuracies = head_accuracies(ranks, 3)
    assert accuracies.tolist() == [[4 / 8, 1 / 8, 1 / 8], [4 / 6, 1 / 6, 0]]
    tree = joint_search(ranks, 3, 4)
    assert tree_choices(tree) == [[0], [1], [0, 0]]
    assert tokens_per_step(ranks, tree) == 1 + (4 + 1 + 2) / 8
    with pytest.raises(ValueError, match="num_nodes: only 6 paths"):
        joint_search(ranks, 3, 9)


def test_joint_search_is_the_best_tree():
    """Against all trees of four nodes, and never behind the tree that takes heads for independent."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 3, (200, 3), generator=generator)
    ranks[:, 1] = torch.where(ranks[:, 0] == 1, 0, ranks[:, 1])  # dependent
    best = joint_search(ranks, 2, 4)
    paths = [(a,) for a in range(2)] + [(a, b) for a in range(2) for b in range(2)]
    paths += [(a, b, c) for a in range(2) for b in range(2) for c in range(2)]
    most = 0.0
    for i, a in enumerate(paths):
        for j, b in enumerate(paths[i + 1 :], start=i + 1):
            for c in paths[j + 1 :]:
                chosen = {a, b, c}
                if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                    most = max(most, tokens_per_step(ranks, TokenTree.from_choices(sorted(chosen))))
    assert tokens_per_step(ranks, best) == most
    for num_nodes in (5, 9, 12):
        independent = TokenTree.search(head_accuracies(ranks, 2), num_nodes)
        assert tokens_per_step(ranks, joint_search(ranks, 2, num_nodes)) >= tokens_per_step(ranks, independent)


def test_searched_tree(work, heads, tmp_path):
    saved = json.loads((heads / "tree.json").read_text())
    assert load_tree(heads).size == 16 == saved["num_nodes"] and len(saved["choices"]) == 15
    assert saved["tokens_per_step"]["joint"] > 1.5
    by_size = list(saved["tokens_per_step_by_num_nodes"].values())
    assert len(by_size) == 4 and by_size == sorted(by_size) and by_size[-1] == saved["tokens_per_step"]["joint"]
    assert [load_tree(heads, size).size for size in range(1, 17)] == list(range(1, 17))
    shutil.copytree(heads, tmp_path / "heads")
    arguments = ["search", *ON_CPU, f"model={work}/model", f"data={work}/answers", f"heads={tmp_path}/heads"]
    assert main([*arguments, "holdout=24", "num_nodes=16", "top_k=5", "method=independent"]) == 0
    again = json.loads((tmp_path / "heads" / "tree.json").read_text())
    assert list(again["tokens_per_step"]) == ["independent"]
    assert again["tokens_per_step"]["independent"] == saved["tokens_per_step"]["independent"]
    assert load_tree(tmp_path / "heads").max_depth <= 3


@pytest.mark.parametrize("batch_size, tree", [(1, "saved"), (3, "dynamic")])
def test_evaluation(work, heads, tmp_path, capsys, batch_size, tree):
    arguments = [
        "evaluate", *ON_CPU, f"model={work}/model", f"heads={heads}", f"prompts={work}/questions.jsonl",
        f"output={tmp_path}/out.json", f"batch_size={batch_size}", f"tree={tree}", "num_nodes=16", "max_new_tokens=16",
        "max_cache_len=128", "transformers=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["all"]["answers"] == out["all"]["identical"] == 16 and out["left_out"] == 0
    assert {name: row["answers"] for name, row in out["categories"].items()} == {"a": 8, "b": 8}
    assert out["all"]["plain"]["tokens_per_step"] == 1.0 < out["all"]["medusa"]["tokens_per_step"]
    assert out["all"]["medusa"]["tokens_per_s"] > 0 and out["transformers_tokens_per_s"] > 0
    assert "16 of 16 answers identical" in capsys.readouterr().out
    phases = out["phases_us"]
    assert phases["plain"].keys() == phases["medusa"].keys() == {"draft", "forward", "accept", "compact"}
    assert all(spent > 0 for each in phases.values() for spent in each.values())
    assert main([*arguments, "fused=true"]) == 2
    assert "fused: expected false on cpu, got True" in capsys.readouterr().err
    assert main([*arguments, "max_cache_len=40"]) == 2
    assert "max_cache_len: no prompt fits" in capsys.readouterr().err


def test_evaluation_leaves_out_what_does_not_fit(work, heads, tmp_path):
    short = json.loads((work / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    rows = [{"category": "a", "turns": ["long " * 120]}, {"category": "b", "turns": [short]}]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"model={work}/model", f"heads={heads}", f"prompts={questions}", f"output={tmp_path}/out.json"]
    assert main(["evaluate", *ON_CPU, *arguments, "max_new_tokens=8", "max_cache_len=128"]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["left_out"] == 1 and list(out["categories"]) == ["b"] and out["phases_us"]["medusa"]["forward"] > 0


def test_demo_with_heads(work, heads, monkeypatch, capsys):
    arguments = ["--model", f"{work}/model", "--device", "cpu", "--prompts", "2", "--max-new-tokens", "12"]
    for more, source in (
        (["--heads", str(heads)], "trees of 16 nodes from Medusa heads"),
        ([], "trees of 16 nodes from n-gram look-up"),
    ):
        monkeypatch.setattr(sys, "argv", ["demo", *arguments, *more])
        assert demo.main() == 0
        out = " ".join(capsys.readouterr().out.split())  # as wide as the terminal
        assert source in out and "identical: yes (2 of 2)" in out


def test_repeated_four_grams():
    assert repeated_four_grams([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4], [1]]) == 1 / 6


def test_learning_rates():
    rate = ramp_and_cosine(2.0, 0.5, 0.1)
    assert [round(rate(x), 6) for x in (0.0, 0.49, 0.5, 0.55, 0.6, 0.8, 1.0)] == [0, 0, 0, 1, 2, 1, 0]
    assert ramp_and_cosine(2.0, 0.0, 0.0)(0.0) == 2.0


def test_config_files_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: [a, b]\noutput: out\nlearning_rate: 2e-4\nepochs: 3\ndevice: cpu\n")
    config = load_config(
        Medusa1Config, path, ["epochs=4", "heads=null", "max_seconds=30", "shared_lm_head=false", "soft=0"]
    )
    assert (config.data, config.learning_rate, config.epochs, config.heads) == (["a", "b"], 2e-4, 4, None)
    assert (config.max_seconds, config.shared_lm_head, config.dtype) == (30.0, False, "float32")
    assert config.mixed_precision == "no"
    assert load_config(DistillConfig, None, ["prompts=x", "output=1"]).output == "1"


@pytest.mark.parametrize(
    "override, message",
    [
        ("lerning_rate=1", "lerning_rate: unknown key; did you mean learning_rate?"),
        ("zzz=1", "zzz: unknown key; expected one of"),
        ("learning_rate", "expected key=value, got 'learning_rate'"),
        ("learning_rate=fast", "learning_rate: expected a value of type float, got 'fast'"),
        ("epochs=2.5", "epochs: expected a value of type int, got 2.5"),
        ("epochs=true", "epochs: expected a value of type int, got True"),
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("epochs=null", "epochs: expected a value of type int, got None"),
        ("shared_lm_head=1", "shared_lm_head: expected a value of type bool, got 1"),
        ("data=[]", "data: expected a list of strings, not empty"),
        ("dtype=int8", "dtype: expected float32"),
        ("decay=0", "decay: expected more than 0"),
        ("warmup=1", "warmup: expected 0..1"),
        ("soft=2", "soft: expected 0..1"),
        ("shared_lm_head=false", "soft: expected 0 with shared_lm_head = false"),
        ("stage1=1", "stage1: expected 0..1"),
        ("mixed_precision=fp8", "mixed_precision: expected no, bf16 or auto"),
        ("dtype=bfloat16", "mixed_precision: expected bf16 with bfloat16"),
        ("holdout=[", "holdout: not readable as YAML"),
    ],
)
def test_config_errors_name_the_key(override, message):
    with pytest.raises(ValueError) as error:
        load_config(Medusa2Config, None, ["data=x", "output=y", "device=cpu", override])
    assert str(error.value).startswith(message)


def test_config_errors_on_the_command_line(tmp_path, capsys):
    for arguments, message in (
        (["search", "data=x"], "search: heads: missing, and has no default"),
        (["search", "data=x", "heads=y", "method=best"], "search: method: expected joint or independent"),
        (["medusa1", "--config", str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected keys and values, got list"):
        load_config(SearchConfig, tmp_path / "bad.yaml")
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0 and "seed=0" in capsys.readouterr().out
