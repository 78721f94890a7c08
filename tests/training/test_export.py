"""`jaxrl-post export`: whole folders, cards, and what transformers and peft read."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import yaml

from jaxrl_post import cli, generation, models, training
from jaxrl_post.training.checkpoints import load_policy


@pytest.fixture(scope="module")
def run_dir(tiny_model, tmp_path_factory):
    """A run that trained an adapter for a step, and was evaluated."""
    path = tmp_path_factory.mktemp("runs") / "run"
    tree = {
        "run": {"dir": str(path), "judge_workers": 1, "seed": 5},
        "model": {"path": str(tiny_model), "lora": {"rank": 3, "alpha": 7}},
        "task": {"name": "tiny_task:load", "max_prompt_length": 16},
        "recipe": {"name": "grpo"},
        "optimizer": {"learning_rate": 0.3},
        "training": {"steps": 1, "prompts_per_step": 4, "group_size": 4},
        "sampling": {"max_new_tokens": 6, "temperature": 0.9},
        "mesh": {"data": 1},
        "evaluation": {"held": {"rows": 4, "samples": 2, "split": "test"}},
    }
    training.run(training.Config.from_dict(tree))
    return path


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_a_folder_appears_whole(run_dir, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert export(run_dir, out) == 0
    policy, params, tokenizer = models.load(out)
    assert tokenizer.chat_template == load_policy(run_dir)[2].chat_template
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["temperature"] == 0.9 and settings["eos_token_id"] == 1

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    for line in (
        "- Recipe: grpo",
        "- Seed: 5",
        "split train",
        "after 1 steps",
        "rank: 3",
    ):
        assert line in card
    rows = [
        json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().split("\n") if x
    ]
    for row in rows:
        assert f"{row['eval/held/avg@2']:.3f}" in card

    capsys.readouterr()
    assert export(run_dir, out) == 2
    assert "exists; choose another path, or replace it (--overwrite" in (
        capsys.readouterr().err
    )
    assert export(run_dir, out, "--overwrite") == 0
    assert export(run_dir, out, "--overwrite", "--adapter") == 2
    assert "no adapter_config.json; it is not overwritten" in capsys.readouterr().err
    assert export(tmp_path / "nothing", tmp_path / "new") == 2

    def fail(self, folder, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    assert export(run_dir, tmp_path / "new") == 1
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_only_adapters_are_exported_as_such(run_dir, tmp_path, capsys):
    config = run_dir.parent / "plain" / "config.yaml"
    config.parent.mkdir()
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["model"]["lora"] = None
    config.write_text(yaml.safe_dump(tree))
    assert export(config.parent, tmp_path / "out", "--adapter") == 2
    assert "model.lora is null" in capsys.readouterr().err


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is no dependency of the project")


def test_transformers_generates_what_we_do(torch, run_dir, tmp_path):
    """Greedily, 64 tokens; merged by transformers, the adapter alone by peft."""
    from transformers import AutoModelForCausalLM

    policy, params, tokenizer = load_policy(run_dir)
    prompts = np.array(tokenizer(["3 + 4 =", "1 + 2 ="])["input_ids"])
    sampler = generation.Sampler(policy, max_new_tokens=64, temperature=0.0)
    mask = np.ones_like(prompts)
    ours = sampler.generate(params, prompts, mask, key=jax.random.key(0)).tokens

    def theirs(model):
        options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None}
        ids = torch.tensor(prompts)
        with torch.no_grad():
            return model.eval().generate(ids, **options)[:, prompts.shape[1] :].numpy()

    assert export(run_dir, tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(theirs(merged), ours)

    peft = pytest.importorskip("peft", reason="peft is no dependency of the project")
    assert export(run_dir, tmp_path / "adapter", "--adapter") == 0
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["model"]["path"])
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.tensor(prompts)
    with torch.no_grad():
        found, plain = adapted(ids).logits.numpy(), merged(ids).logits.numpy()
    where = np.broadcast_to(np.arange(prompts.shape[1]), prompts.shape)
    hidden, _ = policy.hidden(params, prompts, where, mask)
    logits = np.asarray(hidden @ policy.unembedding(params).T)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    np.testing.assert_allclose(plain, logits, atol=1e-4)
    with adapted.disable_adapter(), torch.no_grad():
        assert np.abs(adapted(ids).logits.numpy() - logits).max() > 1e-2
    np.testing.assert_array_equal(theirs(adapted), ours)
