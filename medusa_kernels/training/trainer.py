"""The training loop of Medusa-1 and Medusa-2: order of data, learning rates and random numbers follow from the step
alone, so that a checkpoint needs the trained parameters, the optimiser and the step to go on exactly."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ..decoding.heads import MedusaHeads, SequentialHeads
from .config import TrainConfig
from .data import Answers, Batch

CHECKPOINT_NAME = "checkpoint.pt"
# What may differ when a run goes on.
_FREE = ("output", "device", "max_seconds", "save_every", "log_every")


def make_accelerator(config: TrainConfig) -> Accelerator:
    # Medusa-2 trains the heads alone at first, so that the adapter's parameters get no gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu", kwargs_handlers=handlers)


def make_heads(config: TrainConfig, model: PreTrainedModel) -> MedusaHeads:
    """New heads, or those to start from, with float32 parameters, as the optimiser needs them."""
    if config.heads is None:
        kind = SequentialHeads if config.sequential else MedusaHeads
        heads = kind.from_model(
            model, config.num_heads, config.num_layers, shared_lm_head=config.shared_lm_head, sees_root=config.sees_root
        )
    else:
        heads = MedusaHeads.from_pretrained(config.heads, model)
        for key in ("num_heads", "num_layers", "shared_lm_head", "sees_root", "sequential"):
            if getattr(heads, key) != getattr(config, key):
                raise ValueError(f"{key}: {config.heads} has {getattr(heads, key)}, the config {getattr(config, key)}")
    return heads.float().requires_grad_(True).train()


class Trainer:
    """Trains `objective`, whose forward takes ids, at, labels and the share of steps done, and gives losses by name,
    `loss` among them.

    groups:  parameters and their learning rate as a function of the share of steps done
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        groups: list[tuple[list[nn.Parameter], Any]],
        answers: Answers,
        indices: Any,
    ):
        self.config, self.accelerator, self.answers, self.indices = config, accelerator, answers, indices
        self.rates = [rate for _, rate in groups]
        # Decay of weights would pull residual blocks, zero at the start, back to nothing.
        optimizer = torch.optim.AdamW([{"params": params, "lr": 0.0} for params, _ in groups], weight_decay=0.0)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.num_heads = config.num_heads
        self.output = Path(config.output)
        self.steps_per_epoch = len(self._plan(0))
        self.steps = self.steps_per_epoch * config.epochs
        self._epoch_plan: tuple[int, list[Any]] = (-1, [])

    def run(self) -> bool:
        """Train to the end, from the checkpoint if there is one. False: stopped before the end, out of time."""
        config, accelerator = self.config, self.accelerator
        began = time.monotonic()
        start, self.spent = self._load()
        before = self.spent
        if start and config.seconds is not None and self._same_everywhere(before) >= config.seconds:
            return True
        parameters = list(self.trained.values())
        main = accelerator.is_main_process
        with tqdm(total=self.steps, initial=start, unit="step", disable=not main) as progress:
            for step in range(start, self.steps):
                done = (step + 0.5) / self.steps  # so that neither the first step nor the last has a rate of 0
                self.spent = before + time.monotonic() - began
                if config.seconds is not None:
                    done = max(done, self._same_everywhere(self.spent) / config.seconds)
                # Dropout's numbers follow from the step: nothing to keep in a checkpoint.
                torch.manual_seed((config.seed * self.steps + step) * accelerator.num_processes
                                  + accelerator.process_index)  # fmt: skip
                batch = self._batch(step)
                for group, rate in zip(self.optimizer.param_groups, self.rates):
                    group["lr"] = rate(done)
                losses = self.objective(*batch, done)
                accelerator.backward(losses["loss"])
                norm = accelerator.clip_grad_norm_(parameters, config.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                progress.update()
                last = step + 1 == self.steps or done >= 1
                if step % config.log_every == 0 or last:
                    self._log(step, losses, norm, progress)
                late = False
                if config.max_seconds is not None:
                    late = self._same_everywhere(time.monotonic() - began) > config.max_seconds
                if last or late or (step + 1) % config.save_every == 0:
                    self._save(step + 1)
                if last:
                    return True
                if late:
                    return False
        return True

    def _same_everywhere(self, seconds: float) -> float:
        """All processes must take the same turn."""
        if self.accelerator.num_processes == 1:
            return seconds
        return float(self.accelerator.reduce(torch.tensor(seconds, device=self.accelerator.device), "mean"))

    def _plan(self, epoch: int) -> list[Any]:
        size = self.config.batch_size * self.accelerator.num_processes
        return self.answers.batches(self.indices, size, self.config.seed, epoch)

    def _batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch_plan[0] != epoch:
            self._epoch_plan = (epoch, self._plan(epoch))
        indices = self._epoch_plan[1][place]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = indices[rank::world] if len(indices) >= world else indices  # an epoch's last batch may be short
        return self.answers.batch(mine, self.num_heads).to(self.accelerator.device)

    def _log(self, step: int, losses: dict[str, Tensor], norm: Any, progress: Any) -> None:
        values = {name: value.item() for name, value in losses.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}")
        if self.accelerator.is_main_process:
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.output.mkdir(parents=True, exist_ok=True)
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
                row = {"step": step, "of": self.steps, **values, "grad_norm": float(norm), "learning_rates": rates}
                log.write(json.dumps(row) + "\n")

    # ---- checkpoint ----

    def _settings(self) -> dict[str, Any]:
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in _FREE}
        del settings["data"]  # wherever it lies, its content counts
        return {**settings, "data": self.answers.fingerprint, "processes": self.accelerator.num_processes}

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "spent": self.spent,
            "settings": json.dumps(self._settings()),
            "parameters": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.optimizer.state_dict(),
        }
        part = self.output / f"{CHECKPOINT_NAME}.part"
        torch.save(state, part)
        os.replace(part, self.output / CHECKPOINT_NAME)

    def _load(self) -> tuple[int, float]:
        """The step to go on from and the seconds spent so far: 0 without a checkpoint."""
        path = self.output / CHECKPOINT_NAME
        if not path.exists():
            return 0, 0.0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before, step = json.loads(state["settings"]), state["step"]
            parameters, optimizer, spent = state["parameters"], state["optimizer"], float(state["spent"])
        except Exception as error:  # a broken file can raise almost anything in the unpickler
            raise ValueError(f"{path}: not readable as a checkpoint, remove it to start anew: {error!r:.300}") from None
        for key, value in self._settings().items():
            if before.get(key) != value:
                raise ValueError(f"{key}: {path} was written with {before.get(key)!r}, now it is {value!r}")
        shapes = {name: tuple(p.shape) for name, p in self.trained.items()}
        if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
            raise ValueError(f"{path}: holds other parameters than this run trains; remove it to start anew")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(parameters[name])
        self.optimizer.optimizer.load_state_dict(optimizer)
        if self.accelerator.is_main_process and (log := self.output / "log.jsonl").is_file():
            # What came after the checkpoint is done again, and logged again.
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] < step]
            log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return step, spent


def ramp_and_cosine(peak: float, start: float, warmup: float) -> Any:
    """Learning rate by the share of steps done: 0 before `start`, up to `peak` for a share `warmup`, then a cosine down
    to 0."""

    def rate(done: float) -> float:
        since = done - start
        if since < 0:
            return 0.0
        if since < warmup:
            return peak * since / warmup
        left = max(1.0 - start - warmup, 1e-9)
        return peak * 0.5 * (1.0 + math.cos(math.pi * min((since - warmup) / left, 1.0)))

    return rate
