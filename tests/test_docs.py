"""The documentation site: its pages, and the settings that it tells newcomers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from jaxrl_post import recipes
from jaxrl_post.training.config import Config

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("optimizer", "sampling", "task", "tracking", "training")


def test_every_page_is_in_the_navigation_and_exists():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"[\w/]+\.md", str(nav))
    docs = ROOT / "docs"
    there = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert sorted(named) == sorted(there)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_pictures_are_shown_and_small():
    pictures = sorted((ROOT / "docs" / "pictures").glob("*"))
    shown = "".join(page.read_text() for page in PAGES)
    assert pictures and all(f"(pictures/{p.name})" in shown for p in pictures)
    assert [p for p in pictures if p.stat().st_size > 150_000] == []


@pytest.mark.parametrize("page", ["coming_from.md", "data.md", "report.md"])
def test_settings_named_are_settings(page):
    text = (ROOT / "docs" / page).read_text()
    hints = inspect.get_annotations(Config, eval_str=True)
    known = {f"{s}.{key}" for s in SECTIONS for key in hints[s].__dataclass_fields__}
    known |= {f"recipe.{key}" for key in inspect.signature(recipes.grpo).parameters}
    known |= {"task.reward", "model.lora", "recipe.preset"}
    known |= {"recipe.posterior_discount"}  # HAPO's
    named = set(re.findall(rf"`((?:recipe|model|{'|'.join(SECTIONS)})\.\w+)", text))
    assert named and named <= known, named - known


def test_the_citation_names_the_version():
    from jaxrl_post import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"


def test_metrics_in_the_table_are_written():
    page = (ROOT / "docs" / "report.md").read_text()
    table = page.partition("## The metrics")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", table, flags=re.M)
    names = [name for cell in cells for name in re.findall("`([a-z_/]+)`", cell)]
    source = "".join(p.read_text() for p in (ROOT / "jaxrl_post").rglob("*.py"))
    assert len(names) > 40 and [n for n in names if f'"{n}"' not in source] == []
