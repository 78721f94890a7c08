"""The Python of README and docs runs as it stands, and the README's commands exist."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import yaml

from jaxrl_post import cli
from jaxrl_post.cli import train
from jaxrl_post.training.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]


def snippets(page):
    text = page.read_text()
    return re.findall(r"^```(?:python|pycon)\n(.*?)^```$", text, flags=re.M | re.S)


def test_readme_has_snippets():
    assert snippets(README)


ALONE = [page for page in PAGES if page.stem != "tutorial"]  # which test_pages.py plays


@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.stem)
def test_snippets(page, tmp_path, monkeypatch):
    """Those of a page run in order, in one folder; `# name.py` on top saves a file.
    Those of a page share their names."""
    names: dict = {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for snippet in snippets(page):
        if name := re.match(r"# (\w+\.py)\n", snippet):
            (tmp_path / name[1]).write_text(snippet)
        elif ">>>" in snippet:
            run_doctest(snippet, names)
        else:
            exec(compile(snippet, "snippet", "exec"), names)


def run_doctest(snippet, names):
    examples = doctest.DocTestParser().get_doctest(snippet, names, "snippet", None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(examples, out=report.append, clear_globs=False)
    names.update(examples.globs)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_configs_in_yaml_are_valid(name):
    """A fragment stands in a config; its sections replace that one's."""
    whole = yaml.safe_load((ROOT / "configs" / "grpo_science.yaml").read_text())
    page = (ROOT / name).read_text()
    texts = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.M | re.S)
    assert texts
    for text in texts:
        tree = yaml.safe_load(text)
        blocks = {} if "task" in tree else whole["evaluation"]
        Config.from_dict({**whole, "evaluation": blocks, **tree}, text)


@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.stem)
def test_commands_are_understood(page, monkeypatch):
    """Arguments of `jaxrl-post`, and the configs and overrides among them."""
    monkeypatch.chdir(ROOT)
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^jaxrl-post .*$", text, flags=re.M):
        arguments = cli._parse(shlex.split(line, comments=True)[1:])
        if arguments.run is train.run:
            load_config(arguments.config, arguments.overrides)


def test_files_and_targets_named_in_readme_exist():
    text = README.read_text()
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets <= known
    files = re.findall(r"\b((?:configs|scripts|docs)/[\w/.-]+\.(?:yaml|py|md))\b", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
