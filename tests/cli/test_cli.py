"""The command line: exit codes, one error each, and what is printed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import yaml

from jaxrl_post import cli
from jaxrl_post.errors import InputError
from jaxrl_post.tasks.lookup import resolve
from jaxrl_post.training.metrics import MetricsWriter

CONFIG = {
    "model": {"path": "science_base"},
    "task": {"name": "science"},
    "recipe": {"name": "grpo"},
    "training": {"steps": 2},
    "evaluation": {"science": {"samples": 4}},
}
BASE = {"step": 0, "eval/science/avg@4": 0.25, "eval/science/parsed": 0.5}
FINAL = {
    "step": 2,
    "reward/mean": 0.5,
    "eval/science/avg@4": 0.5,
    "eval/science/avg@4/low": 0.41,
    "eval/science/avg@4/high": 0.59,
    "eval/science/parsed": 1.0,
}


class Interrupted(Exception):
    def __init__(self, signum):
        self.signum = signum


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "short.yaml"
    tree = CONFIG | {"run": {"dir": str(tmp_path / "run")}}
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def module(monkeypatch):
    """Puts a made-up module of `jaxrl_post.training` in the real one's place."""

    def put(name, **names):
        fake = types.SimpleNamespace(**names)
        monkeypatch.setitem(sys.modules, f"jaxrl_post.training.{name}", fake)

    return put


def write_run(run_dir, *rows):
    with MetricsWriter(run_dir) as writer:
        for row in rows:
            writer.write(row)


def test_bad_input_is_one_error_before_anything_heavy_is_imported(config, tmp_path):
    commands = [
        ["train", str(tmp_path / "none.yaml")],
        ["train", config, "training.stepz=3"],
        ["train", config, "training.steps=many"],
        ["train", config, "steps"],
        ["evaluate", config, "evaluation.science.samples=0"],
        ["evaluate", config, "evaluation={}"],
        ["evaluate", config, "--task=gsm8k"],
        ["evaluate", "science_base", "modle.path=x"],
        ["train", config, "task.max_promt_length=9"],
        ["train", config, "task.name=scince"],
        ["evaluate", config, "evaluation.science.smaples=9"],
        ["evaluate", "science_base", "--task=rows"],
        ["sample", "science_base", "-n", "0"],
        ["sample", "science_base", "--temperature", "nan"],
        ["sample", "science_base", "-n", "2", "--temperature", "0"],
        ["report", str(tmp_path / "none")],
        ["report", str(tmp_path)],
        ["report", str(tmp_path), "--wat"],
        ["train", config, "--wat", "run.seed=1"],
        ["trian"],
        [],
    ]
    code = (
        "import sys\n"
        "from jaxrl_post.cli import main\n"
        f"for argv in {commands!r}:\n"
        "    print('-----', file=sys.stderr, flush=True)\n"
        "    assert main(argv) == 2, argv\n"
        "assert not {'jax', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    errors = result.stderr.split("-----\n")[1:]
    assert len(errors) == len(commands)
    for argv, error in zip(commands, errors, strict=True):
        assert error.count("error: ") == 1, (argv, error)
    assert "training.stepz" in errors[1] and "training.steps'" in errors[1]
    assert "evaluation.test.samples" in errors[5]
    assert "max_promt_length=9: no such key" in errors[8]
    assert "'max_prompt_length'" in errors[8] and "'science'" in errors[9]
    assert "did you mean 'samples'?" in errors[10]
    assert "task.source: missing" in errors[11] and "temperature nan" in errors[13]
    assert not (tmp_path / "run").exists()


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "evaluate", "sample", "report"))
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        assert f"jaxrl-post {name} " in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxrl-post 0.")


@pytest.mark.parametrize(
    ("variable", "text", "threads"),
    [
        ("JAX_NUM_CPU_DEVICES", "64", 256),
        ("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=32", 128),
        ("JAX_NUM_CPU_DEVICES", "1", None),
    ],
)
def test_fake_devices_get_threads(monkeypatch, variable, text, threads):
    for name in ("NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, text)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cli.main(["--version"])
    given = os.environ.pop("NPROC", None)
    assert given == (None if threads is None else str(threads))


@pytest.mark.parametrize(
    "argv", [["--debug", "report", "x"], ["report", "x", "--debug"]]
)
def test_debug_prints_the_traceback(argv, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "error: x: there is no such run folder" in error


def test_an_error_of_ours_keeps_its_traceback(config, module, capsys):
    def run(config, progress, allow_changes):
        raise RuntimeError("a bug")

    module("loop", run=run, Interrupted=Interrupted)
    assert cli.main(["train", config]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_train_prints_the_gain_and_its_causes(config, module, tmp_path, capsys):
    def run(config, progress, allow_changes):
        assert config.training.steps == 5
        with progress(config.training.steps, 0) as bar:
            bar.update(1, {"reward/mean": 0.5})
        write_run(config.run.dir, BASE, {"step": 1, "reward/mean": 0.3}, FINAL)

    module("loop", run=run, Interrupted=Interrupted)
    assert cli.main(["train", config, "training.steps=5"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "                           base  final    gain       95 %",
        "science  avg@4            0.250  0.500  +0.250  0.41–0.59",
        "         parsed           0.500  1.000  +0.500",
        "         right if parsed  0.500  0.500  +0.000",
        "science: of the gain, +0.250 comes from answers that parse, "
        "+0.000 from answers that are right.",
        f"report: {tmp_path}/run/report.html",
    ]
    assert (tmp_path / "run" / "report.html").is_file()
    assert output.err == "step 1/5  reward 0.500  0:00 left\n"


@pytest.mark.parametrize(
    "signum, name, code", [(2, "SIGINT", 130), (15, "SIGTERM", 143)]
)
def test_a_stopped_run_says_how_to_resume(config, module, capsys, signum, name, code):
    def run(config, progress, allow_changes):
        raise Interrupted(signum)

    module("loop", run=run, Interrupted=Interrupted)
    assert cli.main(["train", config, "model.path=a b"]) == code
    output = capsys.readouterr()
    assert f"stopped by {name}; saved" in output.err
    assert f"jaxrl-post train {config} 'model.path=a b'" in output.err
    assert output.out == ""


def test_flags_of_train_reach_the_run(config, module, tmp_path):
    seen = []

    def run(config, progress, allow_changes):
        seen.append((config.run.replay, allow_changes))

    module("loop", run=run, Interrupted=Interrupted)
    write_run(tmp_path / "run", BASE)
    assert cli.main(["train", config]) == 0
    flags = ["--replay", "runs/a", "--allow-changes"]
    assert cli.main(["train", *flags, config, "training.steps=3"]) == 0
    assert seen == [(None, False), ("runs/a", True)]


def test_modules_in_the_current_folder_are_found(config, module, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def one(): return 1\n")
    # The path as a console script sees it.
    path = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.chdir(tmp_path)
    found = []
    module(
        "loop",
        run=lambda config, **_: found.append(resolve("my_rewards:one")()),
        Interrupted=Interrupted,
    )
    write_run(tmp_path / "run", BASE)
    assert cli.main(["train", config]) == 0
    assert found == [1]


def test_ctrl_c_elsewhere_is_no_traceback(config, module, capsys):
    def evaluate_run(config, run_dir):
        raise KeyboardInterrupt

    module("evaluation", evaluate_run=evaluate_run)
    assert cli.main(["evaluate", config]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_evaluate_prints_a_table_or_one_json_object(config, module, capsys):
    scores = {key: value for key, value in FINAL.items() if key.startswith("eval/")}
    scores["eval/science/length"] = float("nan")
    module("evaluation", evaluate_run=lambda config, run_dir: scores)
    assert cli.main(["evaluate", config, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["eval/science/avg@4"] == 0.5
    assert printed["eval/science/length"] is None
    del scores["eval/science/length"]
    assert cli.main(["evaluate", config]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "                                      95 %",
        "science  avg@4            0.500  0.41–0.59",
        "         parsed           1.000",
        "         right if parsed  0.500",
    ]


def test_evaluate_knows_configs_runs_and_models(config, module, tmp_path):
    calls = []
    module("evaluation", evaluate_run=lambda *args: calls.append(args) or {})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    for what in (
        [config, "evaluation.science.samples=2"],
        [str(run_dir), "run.seed=7"],
        ["some/model.gguf", "--task", "gsm8k", "evaluation.gsm8k.rows=9"],
    ):
        assert cli.main(["evaluate", *what]) == 0
    (first, none), (second, folder), (third, no_run) = calls
    assert first.evaluation["science"].samples == 2 and none is None
    assert second.run.seed == 7 and folder == run_dir
    assert third.model.path == "some/model.gguf" and no_run is None
    assert third.evaluation["gsm8k"].rows == 9
    assert third.evaluation["gsm8k"].task == "gsm8k"


def test_a_model_alone_is_measured_on_its_task_s_test_split(module):
    calls = []
    module("evaluation", evaluate_run=lambda *args: calls.append(args) or {})
    assert cli.main(["evaluate", "science_base"]) == 0
    task = ["--task", "my_tasks:load", "evaluation.my_tasks.load.rows=9"]
    assert cli.main(["evaluate", "science_base", *task]) == 0
    (science, _), (own, _) = calls
    assert science.evaluation["science"].split == "test"
    # What an answer may be longest, the embedded model has positions for.
    block = science.evaluation["science"]
    assert block.max_prompt_length + block.max_new_tokens <= 512
    (name, block), *others = own.evaluation.items()
    assert (name, block.task, block.rows) == ("my_tasks.load", "my_tasks:load", 9)
    assert not others


def test_a_finished_run_s_report_is_left_alone(config, module, tmp_path, capsys):
    module(
        "loop",
        run=lambda config, progress, allow_changes: None,
        Interrupted=Interrupted,
    )
    write_run(tmp_path / "run", BASE, {"step": 1}, FINAL)
    page = tmp_path / "run" / "report.html"
    pages = []
    for _ in range(2):
        assert cli.main(["train", config]) == 0
        assert str(page) in capsys.readouterr().out
        pages.append(page.stat().st_mtime_ns)
    assert pages[0] == pages[1]
    os.utime(tmp_path / "run" / "metrics.jsonl", ns=(0, pages[1] + 1))
    assert cli.main(["train", config]) == 0
    assert page.stat().st_mtime_ns > pages[1]


def test_report_prints_the_paths(tmp_path, capsys):
    for name in ("a", "b"):
        write_run(tmp_path / name, BASE)
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [f"{tmp_path}/{name}/report.html" for name in ("a", "b")]


def test_a_compilation_cache_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    command = [sys.executable, "-m", "jaxrl_post.cli", "sample", "science_base"]
    done = subprocess.run(
        [*command, "--prompt", "Why?", "--max-new-tokens", "1"],
        env=os.environ
        | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr.startswith(
        f"warning: the compilation cache '{cache}' cannot be written (Not a directory)"
    )
    assert done.stderr.count("\n") == 1


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path):
    command = [sys.executable, "-m", "jaxrl_post.cli", "sample", "science_base"]
    own = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--prompt", "Why?", "--max-new-tokens", "1"],
            env=kept | own | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        programs = tmp_path.glob("jaxrl_post/compiled/*/*-cache")
        seen.append({path.name for path in programs})
    assert seen[0] and seen[1] == seen[0]  # the second run compiles nothing new


def test_an_input_error_inside_a_run_is_bad_input_too(config, module, capsys):
    def run(config, progress, allow_changes):
        raise InputError("the prompts are too long")

    module("loop", run=run, Interrupted=Interrupted)
    assert cli.main(["train", config]) == 2
    assert capsys.readouterr().err == "error: the prompts are too long\n"
