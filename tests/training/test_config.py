"""The config: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from jaxrl_post.errors import ConfigError, InputError
from jaxrl_post.training import config as config_module
from jaxrl_post.training.config import Config, load_config
from jaxrl_post.training.configfile import parse_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TEXT = """
model: {path: science_base}
task: {name: science, levels: [1, 2]}
recipe: {name: grpo, clip_high: 0.28}
optimizer: {learning_rate: 3e-4}
training: {steps: 40, prompts_per_step: 16, group_size: 8}
sampling: {max_new_tokens: 32}
evaluation:
  science: {rows: 128, samples: 16}
  science-t0.6: {rows: 64, temperature: 0.6, levels: [3]}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return list(error.value.problems)


def test_values_and_defaults(path):
    config = load_config(path)
    assert config.optimizer.learning_rate == 3e-4
    assert config.training.steps == 40
    assert config.training.updates_per_step == 1
    assert config.task.options == {"levels": [1, 2]}
    assert config.recipe.arguments == {"clip_high": 0.28}
    assert config.run.dir == "runs/small"
    assert config.mesh == config_module.MeshConfig(data=-1, fsdp=1, tensor=1)


def test_evaluation_blocks_inherit(path):
    science, cold = load_config(path).evaluation.values()
    assert (science.task, science.options) == ("science", {"levels": [1, 2]})
    assert (cold.task, cold.options) == ("science", {"levels": [3]})
    assert science.max_new_tokens == cold.max_new_tokens == 32
    other = load_config(path, ["evaluation.science.task=gsm8k"]).evaluation["science"]
    assert (other.task, other.options) == ("gsm8k", {})


def test_overrides(path):
    config = load_config(
        path,
        [
            "optimizer.learning_rate=1e-5",
            "optimizer.max_grad_norm=null",
            "evaluation.science-t0.6.samples=4",
            "evaluation.new.rows=2",
            "sampling.stop=['\\n', END]",
            "recipe.clip_high=0.3",
            "recipe.clip_high=0.4",
            "run.dir=a=b",
        ],
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.max_grad_norm is None
    assert config.evaluation["science-t0.6"].samples == 4
    assert config.evaluation["science-t0.6"].rows == 64
    assert config.evaluation["new"].rows == 2
    assert config.sampling.stop == ("\\n", "END")
    assert config.recipe.arguments == {"clip_high": 0.4}
    assert config.run.dir == "a=b"


def test_resolved_text_means_the_same_config(path, tmp_path):
    config = load_config(path, ["sampling.stop=[x]", "optimizer.eps=1e-8"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert Config.from_dict(config.to_dict()) == config


def test_free_sections_keep_every_key(path):
    """A key that `task` has no field for is the task's argument, also in YAML."""
    own = ["task={name: mine:load, anything: {deep: [1, {x: y}]}}", "evaluation={}"]
    tree = load_config(path, own).to_dict()
    assert tree["task"]["anything"] == {"deep": [1, {"x": "y"}]}
    assert "options" not in tree["task"]


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("training.stpes=3", "training.stpes=3: no such key; did you mean 'training."),
        ("steps=3", "did you mean 'training.steps'?"),
        ("training.learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("optimiser.b1=0.5", "did you mean 'optimizer'?"),
        ("optimizer.learning_rate=fast", "learning_rate='fast': expected a number"),
        ("optimizer.learning_rate=.nan", "must be a finite number"),
        ("optimizer.b1=1", "must be at least 0 and below 1"),
        ("optimizer.name=adam", "did you mean 'adamw'?"),
        ("model.param_dtype=float16", "expected 'float32' or 'bfloat16'"),
        ("training.steps=true", "training.steps=True: expected an integer"),
        ("training.steps=2.5", "training.steps=2.5: expected an integer"),
        ("training.steps=-1", "must be at least 0"),
        ("training.steps=null", "training.steps=None: expected an integer"),
        ("training.group_size=0", "training.group_size=0: must be at least 1"),
        ("training.updates_per_step=3", "must divide training.prompts_per_step=16"),
        ("sampling.temperature=0", "must be above 0"),
        ("sampling.top_p=0.9", "set sampling.allow_truncated_sampling=true"),
        ("sampling.top_k=20", "set sampling.allow_truncated_sampling=true"),
        ("sampling.min_p=0.1", "set sampling.allow_truncated_sampling=true"),
        ("sampling.stop=END", "sampling.stop='END': expected a list, each item text"),
        ("sampling.stop=[1]", "sampling.stop.0=1: expected text"),
        ("mesh.fsdp=-1", "mesh.data=-1 and mesh.fsdp=-1: only one axis"),
        ("mesh.tensor=-1", "mesh.data=-1 and mesh.tensor=-1: only one axis"),
        ("mesh.tensor=0", "mesh.tensor=0: must be a number of devices"),
        ("mesh=8", "mesh=8: expected a section of keys"),
        ("evaluation.science.greedy=true", "evaluation.science.samples=16: greedy"),
        ("evaluation.a/b.rows=1", "evaluation.'a/b': a block's name"),
        ("model={}", "model.path: missing"),
        ("training.micro_batch_tokens=99", "must be at least 1056, the tokens of the"),
        ("training.micro_batch_tokens_per_shard=99", "must be at least 1056, the"),
        ("training.keep_best=eval/sience/avg@16", "block 'sience'; did you mean 'sc"),
        ("task.levls=[1]", "task.levls=[1]: no such key; did you mean 'levels'?"),
        ("task.max_promt_length=9", "did you mean 'max_prompt_length'?"),
        ("task.name=scince", "task.name='scince': there is no such task; did you mean"),
        ("evaluation.science.smaples=2", "did you mean 'samples'?"),
        ("evaluation.science.levls=2", "evaluation.science.levls=2: no such key; did"),
        ("evaluation.science.task=rows", "evaluation.science.source: missing"),
        ("evaluation.science.task=rwos", "evaluation.science.task='rwos': there is no"),
        ("stages.rl.run.seed=3", "no section of a stage; known: optimizer, recipe,"),
        ("stages.rl.training.stpes=3", "training.stpes=3: no such key"),
    ],
)
def test_refused(path, assignment, words):
    (problem,) = problems(path, assignment)
    with pytest.raises(InputError) as error:
        load_config(path, [assignment])
    assert words in str(error.value), problem


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("steps", "override 'steps': write overrides as section.key=value"),
        ("=3", "write overrides as section.key=value"),
        ("run.seed.x=3", "run.seed={'x': 3}: expected an integer"),
        ("training.steps.x=3", "there is no section to hold 'x'"),
        ("model.path='", "override"),
    ],
)
def test_malformed_overrides(path, assignment, words):
    with pytest.raises(ConfigError, match="override|run.seed") as error:
        load_config(path, [assignment])
    assert words in str(error.value)


def test_all_problems_at_once(path):
    found = problems(path, "training.stpes=3", "optimizer.b2=2", "mesh.fsdp=x")
    assert [p.partition("=")[0] for p in found] == [
        "optimizer.b2",
        "training.stpes",
        "mesh.fsdp",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "expected sections"),
        ("[1, 2]", "expected sections"),
        ("model: {path: x", "line 1"),
        (
            "model: {path: x}\nmodel: {path: y}",
            "line 2: the key 'model' is given twice",
        ),
        ("1: 2", "line 1: the key 1 is not text"),
        ("model: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: " + "[" * 5000, "small.yaml"),
    ],
)
def test_malformed_files(path, text, words):
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_file_that_is_not_there(path):
    with pytest.raises(ConfigError, match="no such file; did you mean '.*small.yaml'"):
        load_config(path.with_name("smal.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path.parent)


def test_truncated_sampling_when_allowed(path):
    allowed = ["sampling.allow_truncated_sampling=true", "sampling.top_p=0.9"]
    assert load_config(path, allowed).sampling.top_p == 0.9


def test_stages_are_laid_over_the_config(path):
    sft = "stages.warm={recipe: {name: sft}, training: {steps: 5}}"
    config = load_config(path, [sft, "stages.rl.optimizer.learning_rate=1e-5"])
    warm, rl = config.stage("warm"), config.stage("rl")
    assert (warm.recipe.name, warm.recipe.arguments) == ("sft", {})
    assert (warm.training.steps, warm.training.group_size) == (5, 8)
    assert warm.optimizer == config.optimizer
    assert (rl.recipe, rl.optimizer.learning_rate) == (config.recipe, 1e-5)
    assert rl.evaluation == config.evaluation
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "text, value",
    [("1e-6", 1e-6), ("-2E+3", -2000.0), ("1.5e3", 1500.0), ("e5", "e5"), ("1", 1)],
)
def test_numbers_as_people_write_them(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_every_key_is_documented():
    """The docs and `--help` are made from these lines."""
    for section in vars(config_module).values():
        if dataclasses.is_dataclass(section):
            documented = [
                line.strip().partition(":")[0]
                for line in (section.__doc__ or "").splitlines()
                if line.startswith("      ") and not line.startswith("       ")
            ]
            names = [field.name for field in dataclasses.fields(section)]
            assert documented == names, section


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configs_are_valid(file):
    config = load_config(file)
    assert yaml.safe_load(config.to_yaml())["recipe"]["name"]
