"""The Python of README and docs runs as it stands, and the README's commands exist."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]
SNIPPETS = {
    f"{page.stem}-{number}": snippet
    for page in PAGES
    for number, snippet in enumerate(
        re.findall(
            r"^```(?:python|pycon)\n(.*?)^```$", page.read_text(), flags=re.M | re.S
        )
    )
}


def test_readme_has_snippets():
    assert "README-0" in SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if ">>>" not in snippet:
        exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
        return
    parser, runner = (
        doctest.DocTestParser(),
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE),
    )
    report: list[str] = []
    runner.run(parser.get_doctest(snippet, {}, "snippet", None, 0), out=report.append)
    assert not runner.failures, "".join(report)


def test_files_and_targets_named_in_readme_exist():
    text = README.read_text()
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", text))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert targets <= known
    files = re.findall(r"\b((?:configs|scripts|docs)/[\w/.-]+\.(?:yaml|py|md))\b", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
