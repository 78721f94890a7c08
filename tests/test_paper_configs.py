"""The papers' settings against the configs that carry them, key by key.

Sources: SDPO, arXiv 2601.20802, Tables 12 and 13 (column "Science QA") and its released
code; PGPO, arXiv 2606.03620, Table 2, Eqs. 8 and 9.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from jaxrl_post import recipes
from jaxrl_post.training import load_config
from jaxrl_post.training.optimizer import make_schedule

CONFIGS = Path(__file__).parents[1] / "configs"

# In Tables 12 and 13 of SDPO and, but for the betas, in Table 2 of PGPO; the task in
# SDPO's code.
SHARED = {
    "model.path": "Qwen/Qwen3-8B",
    "model.chat_template_arguments.enable_thinking": False,
    "task.name": "sciknoweval",
    "task.domain": "chemistry",  # each domain is a run of its own: the first
    "task.answer_format": "tags",  # SDPO's code; PGPO's Table 3 shows a box
    "task.max_prompt_length": 2048,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_updates": 10,
    "optimizer.weight_decay": 0.01,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.max_grad_norm": 1.0,
    "training.prompts_per_step": 32,
    "training.group_size": 8,
    "training.updates_per_step": 1,  # mini-batches of 32 questions
    "training.evaluate_every": 5,
    "sampling.temperature": 1.0,
    "sampling.max_new_tokens": 8192,
    "evaluation.sciknoweval.split": "test",
    "evaluation.sciknoweval.samples": 16,
    "evaluation.sciknoweval.temperature": 0.6,
    "evaluation.sciknoweval.top_p": 0.95,
}
# In SDPO's Tables 12 and 13, where nothing else is said.
DISTILLATION = {
    "recipe.name": "sdpo",
    "recipe.alpha": 0.5,
    "recipe.top_k": 100,
    "recipe.tail": True,
    "recipe.support": "student",  # code
    "recipe.importance_clip": 2.0,
    "recipe.truncated_importance": 2.0,
    "recipe.reduction": "sequence_mean_over_all",  # code, what it effectively does
    "recipe.teacher": "ema",
    "recipe.teacher_rate": 0.05,
    "recipe.teacher_every": 1,  # code: once per rollout batch, which is one update
    "recipe.demonstration": "first",  # code
    "recipe.feedback": "never",  # code: environment feedback off
    "recipe.exclude_self": True,  # code
    "recipe.success_threshold": 0.5,  # code
    "recipe.remove_thinking": True,  # code
    "recipe.max_length": 10_240,
}
MODULATION = {
    "recipe.name": "pgpo",
    "recipe.sensitivity": 1.0,  # Table 2, of 0.5, 1.0 and 1.5
    "recipe.min_multiplier": 0.0,  # Eq. 9 has no lower bound
    "recipe.delay": 0,  # Algorithm 1
    "training.steps": 100,  # Figure 2
}
# In SDPO's code.
GRPO = {
    "recipe.name": "grpo",
    "recipe.scale": "none",
    "recipe.importance": "token",
    "recipe.clip_low": 0.2,
    "recipe.clip_high": 0.28,
    "recipe.dual_clip": 3.0,
    "recipe.log_ratio_clamp": 20.0,
    "recipe.truncated_importance": 2.0,
    "recipe.truncated_importance_level": "token",
    "recipe.kl_weight": 0.0,
    "recipe.entropy_weight": 0.0,
    "recipe.reduction": "sequence_mean_over_all",  # what it effectively does
}
PAPERS = {
    "sdpo_qwen3_8b_sciknoweval": SHARED | DISTILLATION,
    "sdpo_olmo3_7b_sciknoweval": SHARED
    | DISTILLATION
    | {"model.path": "allenai/Olmo-3-7B-Instruct"},
    "pgpo_qwen3_8b_sciknoweval": SHARED | DISTILLATION | MODULATION,
    "grpo_qwen3_8b_sciknoweval": SHARED
    | GRPO
    | {
        "optimizer.learning_rate": 1e-6,
        "optimizer.warmup_updates": 40,  # the code counts rollout batches: 4 updates
        "training.updates_per_step": 4,  # mini-batches of 8 questions
    },
    "grpo_on_policy_qwen3_8b_sciknoweval": SHARED | GRPO,
}
# What no paper says: ours.
OPEN = {
    "model.param_dtype": "float32",
    "model.compute_dtype": "bfloat16",
    "optimizer.eps": 1e-8,
    "training.steps": 100,
    "training.checkpoint_every": 20,
}
OPEN_FOR_THE_DEVICES = {
    "training.micro_batch_tokens",
    "sampling.slots",
    "mesh.data",
    "mesh.fsdp",
}
OPEN_IN_PGPO = {
    "recipe.max_multiplier": 2.0,
    "recipe.average": "sequence",
    "recipe.smoothing": None,
    "recipe.scale_decay": True,
    "recipe.entropy_support": "full",
}


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    pairs = ((f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items())
    return {
        name: leaf for key, value in pairs for name, leaf in _flat(value, key).items()
    }


def _load(name, *overrides):
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _open(name):
    return OPEN | (OPEN_IN_PGPO if name.startswith("pgpo") else {})


def _recipe(config):
    return recipes.make(config.recipe.name, **config.recipe.arguments)


def _arguments(function):
    """All that nested partials fix, by name."""
    found = {}
    for key, value in getattr(function, "keywords", {}).items():
        if isinstance(value, partial):
            found |= _arguments(value)
        else:
            found |= value if isinstance(value, dict) else {key: value}
    return found


@pytest.mark.parametrize("name", PAPERS)
def test_numbers_are_the_papers(name):
    expected = _open(name) | PAPERS[name]
    loaded = _flat(_load(name).to_dict())
    assert {key: loaded.get(key) for key in expected} == expected
    written = _flat(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert written.keys() == expected.keys() | OPEN_FOR_THE_DEVICES


@pytest.mark.parametrize("name", PAPERS)
def test_open_settings_are_said_to_be_open(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    for key in (_open(name).keys() | OPEN_FOR_THE_DEVICES) - PAPERS[name].keys():
        section, last = key.split(".")
        written = f"{section}: {{" if section == "mesh" else f"  {last}: "
        (at,) = [i for i, line in enumerate(lines) if line.startswith(written)]
        above = at
        while lines[above - 1].strip().startswith("#"):
            above -= 1
        comment = " ".join(lines[above : at + 1]).lower()
        assert "the paper does not say" in comment, key


@pytest.mark.parametrize("name", PAPERS)
def test_ten_steps_of_warm_up_then_constant(name):
    config = _load(name)
    per_step = config.training.updates_per_step
    updates = config.training.steps * per_step
    rate = make_schedule(config.optimizer, updates)
    peak = PAPERS[name]["optimizer.learning_rate"]
    rates = [float(rate(step * per_step)) for step in (0, 5, 10, 99)]
    assert rates == pytest.approx([0.0, peak / 2, peak, peak])


@pytest.mark.parametrize("name", PAPERS)
def test_longest_sequences_fit(name):
    """One on each of eight devices: a step must not fail when a response is long."""
    config = _load(name)
    recipe, response = _recipe(config), config.sampling.max_new_tokens
    longest = config.task.max_prompt_length + response
    if recipe.reprompt is not None:
        longest += recipe.reprompt.max_length + response
    assert config.training.micro_batch_tokens == 8 * longest
    assert config.training.prompts_per_step // config.training.updates_per_step % 8 == 0


@pytest.mark.parametrize("name", [n for n in PAPERS if not n.startswith("grpo")])
def test_distillation_as_made(name):
    recipe = _recipe(_load(name))
    (term,) = recipe.terms
    assert (term.name, term.weight) == ("distillation", 1.0)
    assert term.reduction == "sequence_mean_over_all"
    scores, loss = _arguments(term.scores), _arguments(term.loss)
    assert (scores["alpha"], scores["top_k"], scores["tail"]) == (0.5, 100, True)
    assert scores["side"] == "student"
    assert (loss["importance_clip"], loss["truncated_importance"]) == (2.0, 2.0)
    assert recipe.teacher == recipes.Teacher("ema", 0.05, 1)
    assert recipe.reprompt == recipes.Reprompt(
        demonstration="first",
        feedback="never",
        exclude_self=True,
        success_threshold=0.5,
        leave_out_correct=False,
        balance_groups=False,
        remove_thinking=True,
        max_length=10_240,
    )
    assert (recipe.information is not None) == name.startswith("pgpo")


@pytest.mark.parametrize("domain", ["chemistry", "physics", "biology", "materials"])
@pytest.mark.parametrize("sensitivity", [0.5, 1.0, 1.5])
def test_pgpo_runs_by_overrides(domain, sensitivity):
    config = _load(
        "pgpo_qwen3_8b_sciknoweval",
        f"task.domain={domain}",
        f"recipe.sensitivity={sensitivity}",
    )
    assert config.task.options["domain"] == domain
    assert config.evaluation["sciknoweval"].options["domain"] == domain
    information = _recipe(config).information
    assert information.sensitivity == sensitivity
    assert (information.min_multiplier, information.max_multiplier) == (0.0, 2.0)
    assert (information.average, information.smoothing) == ("sequence", None)
    assert (information.delay, information.scale_decay) == (0, True)


@pytest.mark.parametrize("name", [n for n in PAPERS if n.startswith("grpo")])
def test_grpo_as_made(name):
    recipe = _recipe(_load(name))
    (term,) = recipe.terms  # neither a KL nor an entropy bonus
    assert term.reduction == "sequence_mean_over_all"
    assert _arguments(term.loss) == {
        "kind": "token",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "threshold": 2.0,
        "level": "token",
    }
    assert _arguments(recipe.advantages)["scale"] == "none"
    assert recipe.group_transforms == () and not recipe.needs
