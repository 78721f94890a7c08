"""The papers' settings against the configs that carry them, key by key.

Sources: SDPO, arXiv 2601.20802, Tables 12 and 13 (column "Science QA") and its released
code; PGPO, arXiv 2606.03620, Table 2, Eqs. 8 and 9; HAPO, arXiv 2603.11321, Sec. 5,
Eqs. 2 to 9; LUFFY, arXiv 2504.14945 and its released script; SRFT, arXiv 2506.19767.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from jaxrl_post import recipes
from jaxrl_post.errors import InputError
from jaxrl_post.recipes.injection import Injection
from jaxrl_post.training import load_config
from jaxrl_post.training.optimizer import make_schedule
from jaxrl_post.training.setup import open_task

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
    "model.remat",
    "training.micro_batch_tokens_per_shard",
    "sampling.slots_per_shard",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}
OPEN_IN_PGPO = {
    "recipe.max_multiplier": 2.0,
    "recipe.average": "sequence",
    "recipe.smoothing": None,
    "recipe.scale_decay": True,
    "recipe.entropy_support": "full",
}

# In HAPO and, where nothing else is said, in LUFFY, whose data and model they are.
MATHEMATICS = {
    "model.path": "Elliott/Qwen2.5-Math-7B-16k-think",
    "task.name": "math",
    "task.source": "Elliott/Openr1-Math-46k-8192",
    "task.prompt": "prompt",
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "training.prompts_per_step": 128,
    "training.group_size": 8,
    "sampling.temperature": 1.0,
}
# In LUFFY's script; HAPO leaves them to "established baselines".
SCRIPT = {
    "task.after_thinking": True,
    "task.max_prompt_length": 1024,
    "optimizer.max_grad_norm": 1.0,
    "training.steps": 500,
    "training.updates_per_step": 2,  # mini-batches of 64 questions
    "training.micro_batch_tokens_per_shard": 32_768,
    "training.evaluate_every": 10,
    "training.checkpoint_every": 50,
    "sampling.max_new_tokens": 8192,
}
DEMONSTRATED = {"task.demonstration": "target"}
BENCHMARKS = {  # data_source and k
    "aime24": ("aime", 32),
    "math500": ("math", 1),
    "olympiadbench": ("olympiad_bench", 1),
    "amc": ("amc", 32),
    "minerva": ("minerva", 1),
}


def _evaluation(*names, **options):
    keys = {"temperature": 0.6, "source": "data/math_eval/valid.parquet", **options}
    return {
        f"evaluation.{name}.{key}": value
        for name in names
        for key, value in {
            **keys,
            "data_source": BENCHMARKS[name][0],
            "samples": BENCHMARKS[name][1],
        }.items()
    }


IN_HAPO = ("aime24", "math500", "olympiadbench")
RATIOS = {"recipe.clip_low": None, "recipe.clip_high": None, "recipe.scale": "none"}
SUMMED = {
    "recipe.reduction": "padded_length",
    "recipe.max_length": 8192,
    "recipe.kl_weight": 0.0,
    "recipe.entropy_weight": 0.001,
}
EQUATIONS = {
    "recipe.scale": "std",  # Eq. 2
    "recipe.reduction": "token_mean",  # Eq. 8
    "recipe.kl_weight": 0.0,
}
MIXED = {
    "hapo_qwen25_math_7b_openr1": MATHEMATICS
    | DEMONSTRATED
    | EQUATIONS
    | _evaluation(*IN_HAPO, demonstration=None)
    | {
        "recipe.name": "hapo",
        "recipe.threshold": 0.8,
        "recipe.gate": "mean",  # Eq. 6
        "recipe.teacher_weight": "unit",  # Eq. 9
        "recipe.success_threshold": 1.0,  # rewards are 0 and 1
        "recipe.replace_successes": False,  # does not matter at this threshold
        "recipe.posterior_discount": None,
        "recipe.entropy_weight": 0.0,  # Eq. 8
    },
    "grpo_qwen25_math_7b_openr1": MATHEMATICS
    | EQUATIONS
    | _evaluation(*IN_HAPO)
    | {"recipe.name": "grpo", "recipe.importance": "token"},
    "luffy_qwen25_math_7b_openr1": MATHEMATICS
    | DEMONSTRATED
    | SCRIPT
    | RATIOS
    | SUMMED
    | _evaluation(*BENCHMARKS, demonstration=None)
    | {
        "recipe.name": "luffy",
        "recipe.preset": "released",
        "recipe.gamma": 0.1,
        "recipe.shaping": "shaped",
    },
    "srft_qwen25_math_7b_openr1": MATHEMATICS
    | DEMONSTRATED
    | SCRIPT
    | RATIOS
    | SUMMED
    | _evaluation(*BENCHMARKS, demonstration=None)
    | {
        "recipe.name": "srft",
        "recipe.sft_weight": 0.5,
        "recipe.entropy_sign": -1.0,
        "recipe.positive_weight": 0.1,
        "recipe.gamma": 0.1,
    },
    "sft_qwen25_math_7b_openr1": MATHEMATICS
    | DEMONSTRATED
    | _evaluation(*BENCHMARKS, demonstration=None, max_new_tokens=8192)
    | {
        "recipe.name": "sft",
        "task.after_thinking": True,  # the data's own filter
        "task.max_prompt_length": 1024,
        "optimizer.learning_rate": 5e-5,
        "optimizer.warmup_updates": 216,  # a tenth of the updates
        "training.steps": 2156,  # 3 epochs of 46 thousand in batches of 64
        "training.prompts_per_step": 64,
        "training.group_size": 1,
        "training.updates_per_step": 1,
        "sampling.max_new_tokens": 15_360,  # 16384 with the prompt
    },
}
del MIXED["sft_qwen25_math_7b_openr1"]["optimizer.schedule"]
# SDPO's other tasks; columns "tool use" and "LiveCodeBench" of the same tables.
WITHOUT_DOMAIN = {
    key: value
    for key, value in (SHARED | DISTILLATION).items()
    if key not in ("task.domain", "task.answer_format")
    and not key.startswith("evaluation.")
}
RICH = {
    "sdpo_qwen3_8b_tooluse": WITHOUT_DOMAIN
    | {
        "task.name": "tooluse",
        "task.source": "data/tooluse",
        "task.mode": "calls",  # ours: the code's way has faults
        "task.feedback": "none",
        "evaluation.tooluse.split": "test",
        "evaluation.tooluse.samples": 16,
        "evaluation.tooluse.temperature": 0.6,
        "evaluation.tooluse.top_p": 0.95,
    },
    "sdpo_qwen3_8b_livecodebench": WITHOUT_DOMAIN
    | {
        "task.name": "code",
        "task.source": "livecodebench/code_generation_lite",
        "task.revision": "refs/pr/6",  # code, as the next two
        "task.start": "2025-02-01",
        "task.end": "2025-05-01",
        "task.tests": "half",  # code; ours in evaluation
        "task.reward": "all",  # code, as the next two
        "task.block": "longest",
        "task.seconds": 6.0,
        "task.sandbox": "required",  # ours: the code has none
        "task.total_seconds": 60.0,
        "task.judge_timeout": 120.0,
        "recipe.alpha": 1.0,
        "recipe.top_k": 20,
        "recipe.teacher_rate": 0.01,
        "recipe.teacher_every": 32,  # code: once per rollout batch
        "recipe.feedback": "without_demonstration",
        "optimizer.learning_rate": 1e-6,
        "optimizer.warmup_updates": 0,
        "training.steps": 90,  # 80 to 90
        "training.updates_per_step": 32,
        "evaluation.code.split": "test",
        "evaluation.code.samples": 4,
        "evaluation.code.temperature": 0.6,
        "evaluation.code.top_p": 0.95,
    },
}
PAPERS_AND_MIXED = PAPERS | MIXED | RICH
# What they do not say: ours.
OPEN_IN_MIXED = {
    "model.param_dtype": "float32",
    "model.compute_dtype": "bfloat16",
    "optimizer.name": "adamw",
    "optimizer.warmup_updates": 0,
    "optimizer.weight_decay": 0.01,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
}
OPEN_IN_HAPOS_GRPO = {
    "recipe.clip_low": 0.2,
    "recipe.clip_high": 0.2,
    "recipe.ddof": 0,
    "recipe.eps": 1e-6,
}
OPEN_BY_RECIPE = {
    "hapo": SCRIPT | OPEN_IN_HAPOS_GRPO | {"recipe.gamma": 0.1, "recipe.tie": "first"},
    "grpo": SCRIPT | OPEN_IN_HAPOS_GRPO | {"recipe.entropy_weight": 0.0},
    "luffy": {},
    "srft": {},
    "sft": {
        "recipe.reduction": "token_mean",
        "optimizer.schedule": "cosine",
        "optimizer.weight_decay": 0.0,
        "optimizer.max_grad_norm": 1.0,
        "training.evaluate_every": 719,
        "training.checkpoint_every": 719,
    },
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
    if name in MIXED:
        return OPEN_IN_MIXED | OPEN_BY_RECIPE[name.partition("_")[0]]
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


@pytest.mark.parametrize("name", PAPERS_AND_MIXED)
def test_numbers_are_the_papers(name):
    expected = _open(name) | PAPERS_AND_MIXED[name]
    loaded = _flat(_load(name).to_dict())
    assert {key: loaded.get(key) for key in expected} == expected
    written = _flat(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert written.keys() == expected.keys() | OPEN_FOR_THE_DEVICES


@pytest.mark.parametrize("name", PAPERS_AND_MIXED)
def test_open_settings_are_said_to_be_open(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    said = PAPERS_AND_MIXED[name].keys()
    for key in (_open(name).keys() | OPEN_FOR_THE_DEVICES) - said:
        section, last = key.split(".")
        start = next(i for i, x in enumerate(lines) if x.startswith(f"{section}:"))
        written = f"{section}: {{" if section == "mesh" else f"  {last}: "
        ats = [i for i, line in enumerate(lines) if line.startswith(written)]
        at = next(i for i in ats if i >= start)
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
    """One on each shard: a step must not fail when a response is long."""
    config = _load(name)
    recipe, response = _recipe(config), config.sampling.max_new_tokens
    longest = config.task.max_prompt_length + response
    if recipe.reprompt is not None:
        longest += recipe.reprompt.max_length + response
    assert config.training.micro_batch_tokens_per_shard == longest
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
    assert (loss["importance_clip"], loss["threshold"]) == (2.0, 2.0)
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


@pytest.mark.parametrize("name", MIXED)
def test_learning_rates_of_the_mixed(name):
    config = _load(name)
    updates = config.training.steps * config.training.updates_per_step
    rate = make_schedule(config.optimizer, updates)
    if name.startswith("sft"):
        rates = [float(rate(update)) for update in (0, 108, 216, updates)]
        assert rates == pytest.approx([0.0, 2.5e-5, 5e-5, 0.0], abs=1e-11)  # float32
    else:
        assert [float(rate(u)) for u in (0, updates)] == pytest.approx([1e-6] * 2)


@pytest.mark.parametrize("name", MIXED)
def test_longest_sequences_of_the_mixed_fit(name):
    """One on each shard, within the model's 16384 positions."""
    config = _load(name)
    longest = config.task.max_prompt_length + config.sampling.max_new_tokens
    assert config.training.micro_batch_tokens_per_shard >= longest
    assert longest <= 16_384
    assert config.training.prompts_per_step // config.training.updates_per_step == 64


def test_hapo_as_made():
    recipe = _recipe(_load("hapo_qwen25_math_7b_openr1"))
    policy_gradient, imitation = recipe.terms
    clips = _arguments(policy_gradient.loss)
    assert (clips["clip_low"], clips["clip_high"]) == (0.2, 0.2)
    shaping = {"form": "shaped", "weight": "unit", "gamma": 0.1}
    assert _arguments(imitation.loss) == shaping
    assert imitation.weight == 1.0
    assert {term.reduction for term in recipe.terms} == {"token_mean"}
    assert recipe.group_transforms == (Injection(threshold=0.8),)
    advantages = _arguments(recipe.advantages)
    assert (advantages["scale"], advantages["ddof"]) == ("std", 0)
    assert not recipe.needs and recipe.posterior_discount is None


@pytest.mark.parametrize("name", ["luffy", "srft"])
def test_luffys_script_as_made(name):
    recipe = _recipe(_load(f"{name}_qwen25_math_7b_openr1"))
    policy_gradient, imitation, *supervised, bonus = recipe.terms
    clips = _arguments(policy_gradient.loss)
    assert (clips["clip_low"], clips["clip_high"]) == (None, None)
    shaping = {"form": "shaped", "weight": "advantage", "gamma": 0.1}
    assert _arguments(imitation.loss) == shaping
    for term in recipe.terms[:-1]:
        assert (term.reduction, float(term.denominator(None))) == ("constant", 8192.0)
    assert (bonus.weight, bonus.reduction) == (0.001, "token_mean")
    assert _arguments(recipe.advantages)["scale"] == "none"
    assert [str(x) for x in recipe.group_transforms] == [
        "the demonstration in place of the last rollout"
    ]
    assert [term.weight for term in supervised] == ([0.5] if name == "srft" else [])
    if name == "srft":
        assert clips["positive_weight"] == 0.1
        assert _arguments(supervised[0].loss) == {"sign": -1.0}


VERL = CONFIGS.parent.resolve() / "../shared/data/math_eval/valid.parquet"
QUESTIONS = {
    "aime24": 30,
    "math500": 500,
    "olympiadbench": 675,
    "amc": 83,
    "minerva": 272,
}


@pytest.mark.parametrize("name", ["eval_math", *MIXED])
def test_benchmarks_are_read_from_verls_layout(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data here
    for block, section in _load(name).evaluation.items():
        assert section.temperature == 0.6 and section.max_new_tokens == 8192
        assert (section.top_k, section.top_p, section.min_p) == (None, None, None)
        with pytest.raises(InputError, match="valid.parquet'; name the place of your"):
            open_task(section.task, section.split, section.options, block)
        if VERL.exists():
            options = {**section.options, "source": str(VERL)}
            task = open_task(section.task, section.split, options, block)
            assert len(task) == QUESTIONS[block]


def test_the_benchmarks_as_reported():
    blocks = _load("eval_math").evaluation
    samples = {name: block.samples for name, block in blocks.items()}
    assert samples == dict.fromkeys(QUESTIONS, 1) | {"aime24": 32}
