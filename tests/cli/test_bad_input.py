"""Wrong configs, data, models and command lines: each is one line, and nothing else.

Every row goes through the command line's `main` in this process: it ends with 2, says
in one line what is wrong and what would be right, leaves the folder as it was, and has
XLA compile nothing. The last rows do the same as users do, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxrl_post import cli

LLAMA = Path(__file__).parents[1] / "goldens" / "models" / "llama"
CONFIG = {
    "model": {"path": "science_base"},
    "task": {"name": "science"},
    "recipe": {"name": "grpo"},
    "training": {"steps": 2, "prompts_per_step": 4},
    "evaluation": {"held": {"samples": 4}},
}

FILES = {
    "good.yaml": yaml.safe_dump(CONFIG),
    "empty.yaml": "",
    "list.yaml": "[1, 2]",
    "torn.yaml": "model: {path: x",
    "twice.yaml": "model: {path: x}\nmodel: {path: y}",
    "numbered.yaml": "1: 2",
    "object.yaml": "model: !!python/object/apply:os.system [touch hacked]",
    "deep.yaml": "a: " + "[" * 5000,
    "bomb.yaml": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "latin.yaml": b"model: {path: caf\xe9}",
    "nothing.jsonl": "",
    "line2.jsonl": '{"prompt": "q", "answer": "a"}\n{"prompt": "q", "ans',
    "line3.jsonl": '{"prompt": "q", "answer": "a"}\n\n[1, 2]\n',
    "latin.jsonl": b'{"prompt": "caf\xe9", "answer": "a"}\n',
    "half.jsonl": '{"prompt": "\\ud800", "answer": "a"}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "columns.jsonl": '{"promt": "q", "answer": "a"}\n',
    "number.jsonl": '{"prompt": 7, "answer": "a"}\n',
    "turns.jsonl": '{"prompt": [{"role": "user"}], "answer": "a"}\n',
    "good.jsonl": '{"prompt": "q", "answer": "a", "data_source": "s"}\n',
    "object.json": '"prompt"',
    "rows.csv": "prompt,answer\nq,a\n",
    "fake.parquet": b"PAR1 and then nothing of that kind PAR1",
    "gsm/train.jsonl": '{"question": "q", "answer": "#### 1"}\n',
    "gsm/test.jsonl": '{"question": "q", "answer": 1}\n',
    "sci/physics/test.jsonl": '{"prompt": "q", "answer": "A", "idx": 0}\n' * 2,
    "bad_rewards.py": "def right(completions, **kw):\n"
    "    return [1.0 for _ in completions]\n"
    "number = 3\n"
    "def task(split, **options):\n"
    "    return 3\n",
    "not_a_run/notes.txt": "nothing",
    "run_file": "I am a file",
    "new_run/config.yaml": yaml.safe_dump(CONFIG),
    "torn_run/config.yaml": "model: {path",
    "torn_run/metrics.jsonl": '{"step": 0}\n',
    "odd_run/config.yaml": yaml.safe_dump(CONFIG),
    "odd_run/metrics.jsonl": '[1]\n{"stpe": 0}\n',
    "text.gguf": "not a model at all, only some text",
    "empty.gguf": "",
    "huge.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "array.gguf": b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**40),
    "bare_folder/readme.md": "no model here",
    "model.bin": b"\x80\x04N.",
}


def model_folder(path: Path, config: dict | str | None = None, weights=True) -> None:
    path.mkdir()
    values = json.loads((LLAMA / "config.json").read_text())
    text = config if isinstance(config, str) else json.dumps(values | (config or {}))
    (path / "config.json").write_text(text)
    if weights:
        shutil.copy(LLAMA / "model.safetensors", path)


def make_models(root: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(LLAMA / "model.safetensors")
    name = "model.norm.weight"
    model_folder(root / "m_no_weights", weights=False)
    model_folder(root / "m_pickle", weights=False)
    (root / "m_pickle" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    model_folder(root / "m_json", "{not json")
    model_folder(root / "m_list", "[1]")
    model_folder(root / "m_architecture", {"model_type": "lama"})
    model_folder(root / "m_text", {"hidden_size": "64"})
    model_folder(root / "m_negative", {"num_attention_heads": -4})
    model_folder(root / "m_heads", {"num_key_value_heads": 3})
    model_folder(root / "m_missing_key", {"vocab_size": None})
    model_folder(root / "m_layers", {"num_hidden_layers": 2**30})
    model_folder(root / "m_rope", {"rope_scaling": "long", "rope_parameters": None})
    model_folder(root / "m_activation", {"hidden_act": "gelu"})
    model_folder(root / "m_stop", {"eos_token_id": "end"})
    model_folder(root / "m_missing", weights=False)
    rest = {k: v for k, v in tensors.items() if k != name}
    save_file(rest, root / "m_missing" / "model.safetensors")
    model_folder(root / "m_shape", weights=False)
    short = {**tensors, name: tensors[name][:-1]}
    save_file(short, root / "m_shape" / "model.safetensors")
    model_folder(root / "m_dtype", weights=False)
    ints = {**tensors, name: tensors[name].astype("int32")}
    save_file(ints, root / "m_dtype" / "model.safetensors")
    model_folder(root / "m_no_tokenizer")
    model_folder(root / "m_cut", weights=False)
    whole = (LLAMA / "model.safetensors").read_bytes()
    (root / "m_cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    model_folder(root / "m_header", weights=False)
    (root / "m_header" / "model.safetensors").write_bytes(b"\xff" * 1024)
    model_folder(root / "m_terabyte", weights=False)
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    ).encode()
    (root / "m_terabyte" / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header
    )
    for kind, file in (("up", "../m_cut/model.safetensors"), ("bin", "x.bin")):
        model_folder(root / f"m_index_{kind}")
        index = {"weight_map": {name: file}}
        path = root / f"m_index_{kind}" / "model.safetensors.index.json"
        path.write_text(json.dumps(index))
    model_folder(root / "m_index_gone", weights=False)
    index = {"weight_map": {name: "model-1-of-1.safetensors"}}
    path = root / "m_index_gone" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    model_folder(root / "m_tokenizer")
    (root / "m_tokenizer" / "tokenizer.json").write_text("{}")


def make_gguf(root: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(root / "m.gguf", "lama")
    writer.add_context_length(64)
    writer.add_tensor("output_norm.weight", jax.numpy.zeros(64).__array__())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = (root / "m.gguf").read_bytes()
    (root / "cut.gguf").write_bytes(whole[:-64])
    (root / "cut_header.gguf").write_bytes(whole[:40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every wrong thing that the table names, by relative path."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(data)
    table = pyarrow.table({"promt": ["q"], "answer": ["a"]})
    pyarrow.parquet.write_table(table, root / "columns.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), root / "empty.parquet")
    make_models(root)
    make_gguf(root)
    return root


def tree(root: Path) -> dict[str, int]:
    """Every file below `root` and when it was written; no caches of Python's."""
    return {
        str(path.relative_to(root)): path.lstat().st_mtime_ns
        for path in root.rglob("*")
        if "__pycache__" not in path.parts and not path.is_dir()
    } | {str(p.relative_to(root)): 0 for p in root.rglob("*") if p.is_dir()}


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, duration, **_: (
        COMPILED.append(name) if "backend_compile" in name else None
    )
)


def train(*overrides: str, config: str = "good.yaml") -> list[str]:
    return ["train", config, *overrides]


def rows(source: str, *overrides: str) -> list[str]:
    """Evaluates on rows of a file."""
    return held("rows", f"source={source}", *overrides)


def held(task: str, *overrides: str) -> list[str]:
    """Evaluates on another task."""
    block = [f"evaluation.held.{x}" for x in (f"task={task}", *overrides)]
    return ["evaluate", "good.yaml", *block]


def sample(model: str, *options: str) -> list[str]:
    return ["sample", model, "--prompt", "q", *options]


# What is typed, and what the line must hold: the value and the remedy.
COMMAND_LINES = [
    ([], "COMMAND"),
    (["trian"], "no command 'trian'; did you mean 'train'?"),
    (["train"], "CONFIG"),
    (["report"], "RUN"),
    (["evaluate"], "WHAT"),
    (["discover"], "are required: CONFIG ("),
    (["discover", "good.yaml", "--problem", "no.json"], "'no.json': there is no such"),
    (["discover", "good.yaml", "--problem", "object.json"], "good.yaml reads no file"),
    (["discover", "good.yaml"], "learns nothing as long as nothing succeeds"),
    (["sample"], "MODEL"),
    (train("--wat"), "unrecognized argument '--wat'"),
    (["evaluate", "good.yaml", "--jsno"], "'--jsno'; did you mean '--json'?"),
    (["evaluate", "good.yaml", "--task"], "--task: expected one argument"),
    (["evaluate", "good.yaml", "--task=gsm8k"], "change it with task.name="),
    (["evaluate", "good.yaml", "evaluation={}"], "evaluation.test.samples=4"),
    (["report", "nowhere"], "nowhere: there is no such run folder"),
    (["report", "not_a_run"], "Name a folder that `jaxrl-post train` has written"),
    (["report", "run_file"], "run_file: there is no such run folder"),
    (["report", "torn_run"], "config.yaml"),
    (["report", "odd_run"], "metrics.jsonl"),
    (["evaluate", "torn_run"], "config.yaml: line 1"),
    (["evaluate", "new_run"], "new_run: there is no checkpoint yet"),
    (sample("new_run"), "new_run: there is no checkpoint yet"),
    (["evaluate", "not_a_run"], "not_a_run is no model"),
    (["evaluate", "nowhere"], "nowhere: no such file or folder"),
    (sample("not_a_run"), "not_a_run is no model"),
    (sample("science_base", "-n", "0"), "-n 0: must be from 1"),
    (sample("science_base", "-n", "x"), "-n: invalid int value: 'x'"),
    (sample("science_base", "--max-new-tokens", "0"), "--max-new-tokens 0: must"),
    (sample("science_base", "--temperature", "-1"), "--temperature -1.0: must"),
    (sample("science_base", "--temperature", "nan"), "--temperature nan: must"),
    (sample("science_base", "--temperature", "inf"), "--temperature inf: must"),
    (sample("science_base", "--seed", "-1"), "--seed -1: must be from 0"),
    (sample("science_base", "--seed", str(2**70)), f"--seed {2**70}: must be from"),
    (sample("science_base", "-n", "2", "--temperature", "0"), "raise the temperature"),
    (["sample", "science_base", "--prompt", " "], "--prompt is empty"),
]
CONFIG_FILES = [
    (train(config="nowhere.yaml"), "nowhere.yaml: there is no such file"),
    (train(config="god.yaml"), "did you mean 'good.yaml'?"),
    (train(config="not_a_run"), "not_a_run: cannot be read"),
    (train(config="a\0b.yaml"), "cannot be read"),
    (train(config="empty.yaml"), "expected sections such as"),
    (train(config="list.yaml"), "expected sections such as"),
    (train(config="torn.yaml"), "torn.yaml: line 1"),
    (train(config="twice.yaml"), "line 2: the key 'model' is given twice"),
    (train(config="numbered.yaml"), "the key 1 is not text; quote it"),
    (train(config="object.yaml"), "could not determine a constructor"),
    (train(config="deep.yaml"), "not readable as YAML"),
    (train(config="bomb.yaml"), "aliases make more than 100000 values"),
    (train(config="latin.yaml"), "latin.yaml: cannot be read"),
]
OVERRIDES = [
    (train("steps"), "write overrides as section.key=value"),
    (train("=3"), "write overrides as section.key=value"),
    (train("a\nb=3"), "write overrides as section.key=value"),
    (train("steps=3"), "did you mean 'training.steps'?"),
    (train("optimiser.b1=0.5"), "did you mean 'optimizer'?"),
    (train("training.steps.x=3"), "there is no section to hold 'x'"),
    (train("model.path='"), "override"),
    (train("model={}"), "model.path: missing"),
    (train("recipe={}"), "recipe.name: missing"),
    (train("task={}"), "task.name: missing"),
    (train("training={}"), "training.steps: missing"),
    (train("mesh=8"), "mesh=8: expected a section of keys"),
]
SECTIONS = [
    (train("run.sed=3"), "run.sed=3: no such key; did you mean 'run.seed'?"),
    (train("run.seed=-1"), "run.seed=-1: must be at least 0"),
    (train("run.seed=4294967296"), "run.seed=4294967296: must be"),
    (train(f"run.seed={2**80}"), "the integer has more than 64 bits"),
    (train("run.judge_workers=0"), "run.judge_workers=0: must be at least 1"),
    (train("run.dir=3"), "run.dir=3: expected text"),
    (train("run.dir=run_file"), "run.dir='run_file' cannot be written"),
    (train("run.dir=run_file/run"), "run.dir='run_file/run' cannot be written"),
    (train("run.dir=/proc/none/run"), "run.dir='/proc/none/run' cannot be written"),
    (train('run.dir="a\\0b"'), "choose another name"),
    (train("model.path=7"), "model.path=7: expected text"),
    (train("model.param_dtype=float16"), "expected 'float32' or 'bfloat16'"),
    (train("model.compute_dtype=float64"), "expected 'float32' or 'bfloat16'"),
    (train("model.chat_template_arguments=3"), "expected a section of keys"),
    (train("task.max_prompt_length=0"), "task.max_prompt_length=0: must be at least"),
    (train("task.max_dropped_share=1.5"), "must be at least 0 and at most 1"),
    (train("task.judge_timeout=0"), "task.judge_timeout=0.0: must be above 0"),
    (train("optimizer.name=adam"), "did you mean 'adamw'?"),
    (train("optimizer.learning_rate=fast"), "'fast': expected a number"),
    (train("optimizer.learning_rate=.nan"), "must be a finite number"),
    (train("optimizer.schedule=cosin"), "did you mean 'cosine'?"),
    (train("optimizer.b1=1"), "must be at least 0 and below 1"),
    (train("optimizer.max_grad_norm=0"), "optimizer.max_grad_norm=0.0: must be above"),
    (train("training.steps=many"), "training.steps='many': expected an integer"),
    (train("training.steps=true"), "training.steps=True: expected an integer"),
    (train("training.steps=2.5"), "training.steps=2.5: expected an integer"),
    (train("training.steps=null"), "training.steps=None: expected an integer"),
    (train("training.group_size=0"), "training.group_size=0: must be at least 1"),
    (train("training.updates_per_step=3"), "must divide training.prompts_per_step=4"),
    (train("training.micro_batch_tokens=99"), "must be at least 1280"),
    (train("training.checkpoint_every=0"), "training.checkpoint_every=0: must be"),
    (train("sampling.temperature=0"), "sampling.temperature=0.0: must be above 0"),
    (train("sampling.top_p=2"), "sampling.top_p=2.0: must be above 0 and at most 1"),
    (train("sampling.top_k=20"), "set sampling.allow_truncated_sampling=true"),
    (train("sampling.stop=END"), "sampling.stop='END': expected a list"),
    (train("sampling.stop=[1]"), "sampling.stop.0=1: expected text"),
    (train("mesh.fsdp=-1"), "only one axis can be the rest"),
    (train("mesh.tensor=0"), "mesh.tensor=0: must be a number of devices"),
    (train("mesh.fast_within=pod"), "expected 'slice' or 'process' or 'all'"),
    (train("mesh.rules=[embed]"), "mesh.rules=['embed']: expected a section of keys"),
    (train("mesh.rules.embed=fdsp"), "mesh.rules.embed='fdsp': must be an axis"),
    (train("mesh.rules.embed=[data, {}]"), "mesh.rules.embed=['data', {}]: must be"),
    (train("evaluation.held.greedy=true"), "set samples to 1"),
    (train("evaluation.a/b.rows=1"), "evaluation.'a/b': a block's name"),
    (train("evaluation.held.smaples=2"), "did you mean 'samples'?"),
    (train("evaluation.held.stop=END"), "evaluation.held.stop='END': expected a list"),
    (train("evaluation.held.rows=0"), "evaluation.held.rows=0: must be at least 1"),
    (train("evaluation=3"), "evaluation=3: expected a section of keys"),
]
STAGES = [
    (train("stages.rl.run.seed=3"), "no section of a stage"),
    (train("stages.rl.training.stpes=3"), "stages.rl.training.stpes=3: no such key"),
    (train("stages.r/l.training.steps=3"), "name a stage by letters"),
    (train("stages.rl.training=3"), "stages.rl.training=3: expected a section"),
    (train("stages=3"), "stages=3: expected a section of keys"),
    (train("stages.rl.training.keep_checkpoints=3"), "set training.keep_checkpoints"),
    (train("stages.rl.recipe.name=gpro"), "stages.rl: recipe.name='gpro'"),
    (train("stages.rl.task.levls=[1]"), "did you mean 'levels'?"),
]
RECIPES = [
    (train("recipe.name=grpo_"), "recipe.name='grpo_': did you mean 'grpo'?"),
    (train("recipe.name=nowhere:f"), "No module 'nowhere'"),
    (train("recipe.name=bad_rewards:rihgt"), "did you mean 'right'?"),
    (train("recipe.name=bad_rewards:task", "recipe.split=x"), "not a Recipe"),
    (train("recipe.name='a:'"), "not of the form 'module:function'"),
    (train("recipe.clip_hihg=0.3"), "recipe.clip_hihg: did you mean 'clip_high'?"),
    (train("recipe.clip_high=big"), "recipe.clip_high='big': expected"),
    (train("recipe.clip_high=-1"), "clip_high"),
    (train("recipe.preset=dapoo"), "recipe.preset='dapoo': did you mean 'dapo'?"),
    (train("recipe.preset=[1]"), "recipe.preset=[1]"),
    (train("recipe.importance=tokens"), "recipe.importance='tokens'"),
    (train("recipe.reduction=constant"), "need max_length"),
    (train("recipe.reduction=mean"), "mean"),
    (train("recipe.kl_estimator=k4", "recipe.kl_weight=0.1"), "k4"),
    (train("recipe.dual_clip=3", "recipe.importance=sequence"), "dual_clip=3"),
    (train("recipe.name=hapo", "recipe.threshold=high"), "recipe.threshold='high'"),
    (train("recipe.name=hapo", "recipe.threshold=2"), "threshold"),
    (train("recipe.name=hapo", "recipe.gate=thomson"), "recipe.gate='thomson'"),
    (train("recipe.name=hapo", "recipe.tie=last"), "recipe.tie='last'"),
    (train("recipe.name=hapo", "recipe.gamma=-1"), "gamma"),
    (train("recipe.name=luffy", "recipe.shaping=shape"), "recipe.shaping='shape'"),
    (train("recipe.name=luffy", "recipe.prefix={ratoi: 1}"), "ratoi"),
    (train("recipe.name=srft", "recipe.entropy_sign=2"), "entropy_sign=2"),
    (train("recipe.name=sft"), "set training.group_size=1"),
    (train("recipe.name=sft", "recipe.gamma=1"), "has no such argument"),
    (train("recipe.name=sdpo", "recipe.alpha=3"), "alpha"),
    (train("recipe.name=sdpo", "recipe.support=both"), "recipe.support='both'"),
    (train("recipe.name=sdpo", "recipe.teacher=emma"), "recipe.teacher='emma'"),
    (train("recipe.name=sdpo", "recipe.teacher_rate=2"), "rate"),
    (train("recipe.name=sdpo", "recipe.templat=x"), "templat"),
    (train("recipe.name=pgpo", "recipe.sensitivity=x"), "sensitivity='x'"),
    (train("recipe.name=pgpo", "recipe.max_multiplier=-1"), "max_multiplier"),
    (train("recipe.information=3"), "recipe.information=3: expected a mapping"),
    (train("recipe.information.sensitivty=1"), "sensitivty"),
    (train("recipe.injection=[1]"), "recipe.injection=[1]: expected a mapping"),
    (train("recipe.injection.threshold=-1"), "recipe.injection: "),
    (train("recipe.injection.gat=mean"), "gat"),
]
TASKS = [
    (train("task.name=scince"), "task.name='scince': there is no such task; did"),
    (train("task.levls=[1]"), "task.levls=[1]: no such key; did you mean 'levels'?"),
    (train("task.name=rows"), "task.source: missing; the task 'rows' needs it"),
    (train("evaluation.held.task=rows"), "evaluation.held.source: missing"),
    (["evaluate", "science_base", "--task", "scince"], "did you mean 'science'?"),
    (held("science", "levels=[9]"), "levels=[9]; choose from [1, 2, 3, 4, 5]"),
    (held("science", "levels=3"), "levels=3: expected a list of int"),
    (held("science", "domains=[alchemy]"), "domains=['alchemy']; choose from"),
    (held("science", "size=0"), "size=0; it must be at least 1"),
    (held("science", "size=x"), "size='x': expected int"),
    (held("science", "split=dev"), "split=['dev']; choose from"),
    (held("reasoning_gym", "dataset=chain_smu"), "did you mean 'chain_sum'?"),
    (held("reasoning_gym", "dataset=chain_sum", "config={x: 1}"), "evaluation.held"),
    (held("reasoning_gym", "dataset=chain_sum", "size=-1"), "size"),
    (held("gsm8k", "path=nowhere/at/all"), "There is no file or folder"),
    (held("gsm8k", "path=gsm"), "has no split 'validation'"),
    (held("gsm8k", "path=gsm", "split=test"), "Column 'answer' must hold texts"),
    (held("gsm8k", "path=gsm", "split=train", "answer_format=hsah"), "mean 'hash'?"),
    (held("sciknoweval", "path=sci"), "splits train and test, not 'validation'"),
    (held("sciknoweval", "domain=physic"), "evaluation.held"),
    (
        held("sciknoweval", "path=sci", "split=test", "domain=physics"),
        "two rows with the id 'sciknoweval/physics/0'",
    ),
    (held("bad_rewards:task"), "returned 3, which is no Task"),
    (held("nowhere:task"), "No module 'nowhere'"),
    (rows("nowhere.jsonl"), "There is no file or folder 'nowhere.jsonl'"),
    (rows("nothing.jsonl"), "nothing.jsonl has no rows"),
    (rows("line2.jsonl"), "line2.jsonl, line 2 is not JSON"),
    (rows("line3.jsonl"), "line3.jsonl, line 3: expected an object"),
    (rows("latin.jsonl"), "latin.jsonl, line 1 is not JSON in UTF-8"),
    (rows("half.jsonl"), "half.jsonl, line 1 has text that is no Unicode"),
    (rows("deep.jsonl"), "deep.jsonl, line 1 is not JSON"),
    (rows("columns.jsonl"), "no column 'prompt'; did you mean 'promt'?"),
    (rows("good.jsonl", "answer=anwser"), "did you mean 'answer'?"),
    (rows("good.jsonl", "judge=maths"), "Unknown judge 'maths'; did you mean 'math'?"),
    (rows("good.jsonl", "data_source=t"), "No row has data_source 't'"),
    (rows("good.jsonl", "answer=null"), "Name a reward function"),
    (rows("number.jsonl"), "A prompt must be a text or a list of messages"),
    (rows("turns.jsonl"), "each with a role and a content"),
    (rows("object.json"), "object.json must hold an object, or a list"),
    (rows("rows.csv"), "must end in one of .jsonl, .json, .parquet"),
    (rows("fake.parquet"), "fake.parquet is no parquet file"),
    (rows("columns.parquet"), "no column 'prompt'; did you mean 'promt'?"),
    (rows("empty.parquet"), "empty.parquet has no rows"),
    (rows("no/such/data"), "There is no file or folder 'no/such/data'"),
    (rows("no-such/data"), "Check the name, the split and the connection"),
    (rows("x" * 300 + ".jsonl"), "cannot be read"),
    (rows("~nobody-of-this-name/x.jsonl"), "cannot be read"),
    (rows("7"), "source=7: expected str"),
]
REWARDS = [
    (held("science", "reward=nowhere:f"), "No module 'nowhere' (for 'nowhere:f')"),
    (held("science", "reward=bad_rewards:rihgt"), "did you mean 'right'?"),
    (held("science", "reward=bad_rewards:number"), "has no function 'number'"),
    (held("science", "reward=right"), "not of the form 'module:function'"),
    (held("science", "reward=3"), "3"),
    (
        held("science", "reward={functions: bad_rewards:right, weights: [1, 2]}"),
        "Got 1 reward functions and 2 weights",
    ),
    (held("science", "reward={function: bad_rewards:right}"), "function"),
    (held("science", "reward=[]"), "Got 0 reward functions"),
]
MODELS = [
    (sample("nowhere"), "nowhere: no such file or folder, no hub id (owner/name)"),
    (sample("x" * 300), "is no path of a model"),
    (sample("~nobody-of-this-name/x"), "is no path of a model"),
    (sample("no-such/model"), "Check the name and the connection"),
    (sample("bare_folder"), "bare_folder is no model: a folder with config.json"),
    (sample("model.bin"), "model.bin is no model: a folder with config.json"),
    (sample("m_no_weights"), "weights are read from safetensors only"),
    (sample("m_pickle"), "pytorch_model.bin is a pickle, which may run code"),
    (sample("m_json"), "config.json is not JSON"),
    (sample("m_list"), "config.json holds no JSON object"),
    (sample("m_architecture"), "'lama' is not supported; did you mean 'llama'?"),
    (sample("m_text"), "hidden_size = '64' is not a positive integer"),
    (sample("m_negative"), "num_attention_heads = -4 is not a positive integer"),
    (sample("m_heads"), "num_heads=4 is not a multiple of num_kv_heads=3"),
    (sample("m_missing_key"), "vocab_size is missing"),
    (sample("m_layers"), f"the config has {2**30} layers, the files have"),
    (sample("m_rope"), "rope_scaling = 'long' is no object"),
    (sample("m_activation"), "hidden_act = 'gelu' is not supported, only 'silu'"),
    (sample("m_stop"), "eos_token_id = 'end' is no token's id"),
    (sample("m_missing"), "missing: model.norm.weight"),
    (sample("m_shape"), "mis-shaped: model.norm.weight is"),
    (sample("m_dtype"), "dtype I32 of model.norm.weight (supported: BF16"),
    (sample("m_cut"), "model.safetensors cannot be read"),
    (sample("m_header"), "model.safetensors cannot be read"),
    (sample("m_terabyte"), "model.safetensors cannot be read"),
    (sample("m_index_up"), "no safetensors file of this folder"),
    (sample("m_index_bin"), "no safetensors file of this folder"),
    (sample("m_index_gone"), "model-1-of-1.safetensors: no such file"),
    (sample("m_tokenizer"), "the tokenizer cannot be loaded"),
    (sample("nowhere.gguf"), "nowhere.gguf: no such file"),
    (sample("text.gguf"), "text.gguf is no GGUF file"),
    (sample("empty.gguf"), "empty.gguf is no GGUF file"),
    (sample("huge.gguf"), "huge.gguf is no GGUF file"),
    (sample("array.gguf"), f"an array of {2**40} values is too long"),
    (sample("cut.gguf"), "tensor output_norm.weight ends at byte"),
    (sample("cut_header.gguf"), "it ends at byte 40"),
    (sample("m.gguf"), "'lama' is not supported; did you mean 'llama'?"),
    (["evaluate", "m_missing"], "missing: model.norm.weight"),
]
TABLE = [
    *COMMAND_LINES,
    *CONFIG_FILES,
    *OVERRIDES,
    *SECTIONS,
    *STAGES,
    *RECIPES,
    *TASKS,
    *REWARDS,
    *MODELS,
]


@pytest.mark.parametrize(
    "argv, words", TABLE, ids=[" ".join(argv)[:60] for argv, _ in TABLE]
)
def test_bad_input(argv, words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    before, compiled = tree(folder), len(COMPILED)
    code = cli.main(argv)
    output = capsys.readouterr()
    assert (code, output.out) == (2, ""), output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
    assert words in output.err
    assert tree(folder) == before
    assert len(COMPILED) == compiled


IN_THE_RUN = [
    (train("task.name=rows", "task.source=nothing.jsonl"), "nothing.jsonl has no rows"),
    (train("mesh.data=1", "model.path=m_missing"), "missing: model.norm.weight"),
    (train("mesh.rules.kv_hedas=null"), "did you mean 'kv_heads'?"),
    (train("mesh.tensor=8"), "mesh.rules.kv_heads=null (not split)"),
    (
        train("mesh.data=1", "task.max_prompt_length=900"),
        "more than the model's 512 positions",
    ),
]


@pytest.mark.parametrize(
    "argv, words", IN_THE_RUN, ids=[" ".join(argv)[-40:] for argv, _ in IN_THE_RUN]
)
def test_what_only_a_run_finds_out(argv, words, folder, monkeypatch, capsys):
    """Data and model are opened in the run's folder, which is then gone again."""
    monkeypatch.chdir(folder)
    before = tree(folder)
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err
    assert tree(folder) == before


BY_PROCESS = [
    (["trian"], {}, "did you mean 'train'?"),
    (train("training.stepz=3"), {}, "did you mean 'training.steps'?"),
    (train(config="object.yaml"), {}, "could not determine a constructor"),
    (train("recipe.name=bad_rewards:rihgt"), {}, "did you mean 'right'?"),
    (rows("line2.jsonl"), {}, "line2.jsonl, line 2 is not JSON"),
    (sample("m_pickle"), {}, "pytorch_model.bin is a pickle"),
    (sample("array.gguf"), {}, "array.gguf is no GGUF file"),
    (["report", "not_a_run"], {}, "not_a_run: not a run folder"),
    # a cache that cannot be written, and a hub that cannot be reached
    (sample("no-such/model"), {"HF_HOME": "/proc/none"}, "Check the name"),
]


@pytest.mark.parametrize(
    "argv, variables, words", BY_PROCESS, ids=[" ".join(x[0])[:40] for x in BY_PROCESS]
)
def test_bad_input_by_process(argv, variables, words, folder):
    before = tree(folder)
    result = subprocess.run(
        [sys.executable, "-m", "jaxrl_post.cli", *argv],
        cwd=folder,
        env=os.environ | variables | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr
    assert tree(folder) == before
