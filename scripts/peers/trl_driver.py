"""TRL's side of scripts/bench_peers.py; runs in an environment of TRL's own.

python trl_driver.py WORK.json RESULT.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import rewards
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


def sdpo_arguments(wording: dict) -> dict:
    """The distillation that both libraries have, the teacher told the same."""
    reprompt, solution = wording["reprompt"], wording["demonstration"]
    return {
        "distillation_mode": "sampled_token",
        "distillation_alpha": 1.0,
        "teacher_model_kind": "ema",
        "reprompt_template": reprompt.replace("{demonstration}", "{solution}"),
        "solution_template": solution.replace(
            "{demonstration}", "{successful_previous_attempt}"
        ),
    }


class Clock(TrainerCallback):
    """Seconds of each step and of its parts."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.parts: dict[str, list[float]] = {}

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.steps.append(time.perf_counter() - self.start)

    def watch(self, owner, method: str) -> None:
        """Replaces a method by one that is timed."""
        plain, seconds = getattr(owner, method), self.parts.setdefault(method, [])

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = plain(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        setattr(owner, method, timed)


def main(work: dict) -> dict:
    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work["checkpoint"])
    model = AutoModelForCausalLM.from_pretrained(
        work["checkpoint"], dtype=torch.float32
    )
    ids = tokenizer(work["prompts"][: work["count"]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probe = model(ids, labels=ids).loss.item()

    sdpo = work["recipe"] == "sdpo"
    if sdpo:
        from trl.experimental.sdpo import SDPOConfig as Config
        from trl.experimental.sdpo import SDPOTrainer as Trainer
    else:
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer
    rows = [
        {"prompt": [{"role": "user", "content": p}] if sdpo else p}
        for p in work["prompts"]
    ]
    wanted = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": work["count"] * work["group"],
        "num_generations": work["group"],
        "max_completion_length": work["new"],
        "max_steps": work["steps"] + 1,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    } | (sdpo_arguments(work["wording"]) if sdpo else {})
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := wanted.keys() - known:
        raise SystemExit(f"TRL {trl.__version__} has no {', '.join(sorted(unknown))}.")
    clock = Clock()
    trainer = Trainer(
        model=model,
        reward_funcs=getattr(rewards, work["reward"]),
        args=Config(**wanted),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    lengths: list[int] = []
    generate = trainer._generate

    def generated(*args, **kwargs):
        result = generate(*args, **kwargs)
        lengths.extend(map(len, result[1]))
        return result

    trainer._generate = generated
    clock.watch(trainer, "_generate")
    clock.watch(trainer, "_calculate_rewards")
    trainer.train()

    logs = [row for row in trainer.state.log_history if "loss" in row]
    judged = clock.parts["_calculate_rewards"]
    generation = clock.parts["_generate"]
    per_step = zip(clock.steps, generation, judged, strict=True)
    return {
        "version": trl.__version__,
        "step": clock.steps,
        "generate": generation,
        "update": [step - made - seen for step, made, seen in per_step],
        "work": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "prompt_tokens": ids.numel(),
            "lengths": sorted(set(lengths)),
            "sequences": len(lengths),
            "optimizer_steps": trainer.state.global_step,
            "probe_loss": probe,
            "first_loss": logs[0]["loss"],
            "first_entropy": logs[0].get("entropy"),
            "distilled": logs[0].get("self_distillation/reprompt_sample_fraction"),
            "shortened": 0,  # up to 10,240 tokens
        },
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
