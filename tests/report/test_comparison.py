"""Comparing runs: what is one line, its mean and its band."""

from __future__ import annotations

import pytest
from report_page import figures

from jaxrl_post import report
from jaxrl_post.errors import InputError
from jaxrl_post.report.comparison import group_runs
from jaxrl_post.report.run import read_run
from jaxrl_post.training.metrics import MetricsWriter


def write_run(folder, recipe, seed, offset=0.0, steps=4):
    folder.mkdir()
    with MetricsWriter(folder) as writer:
        writer.write({"step": 0, "eval/science/avg@4": 0.1})
        for step in range(1, steps + 1):
            row = {"step": step, "reward/mean": step / 10 + offset, "loss": 0.5}
            if step == steps:
                row["eval/science/avg@4"] = 0.4 + offset
            writer.write(row)
    config = f"recipe: {{name: {recipe}}}\nrun: {{dir: {folder.name}, seed: {seed}}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "a", "grpo", 0),
        write_run(tmp_path / "b", "grpo", 1, 0.2),
        write_run(tmp_path / "c", "pgpo", 0, 0.5, steps=3),
    ]


def test_runs_that_differ_in_their_seed_are_one_group(runs):
    groups = group_runs([read_run(run) for run in runs])
    found = {k: [run.path.name for run in group] for k, group in groups.items()}
    assert found == {"name=grpo": ["a", "b"], "name=pgpo": ["c"]}


def test_lines_are_means_and_bands_reach_over_the_runs(runs, tmp_path):
    page = report.build_comparison(runs, tmp_path / "page.html").read_text()
    reward = figures(page)["Reward"]
    means = [round(y, 2) for _, y in reward.lines["name=grpo"]]
    assert means == [0.2, 0.3, 0.4, 0.5]  # of step / 10 and that plus 0.2
    assert [round(y, 2) for _, y in reward.lines["name=pgpo"]] == [0.6, 0.7, 0.8]
    assert page.count("<polygon") == 3  # reward, loss and avg@4 of two seeds
    assert "0.500<small> 0.400–0.600</small>" in page  # the last evaluations
    assert "<td>0, 1</td>" in page  # the seeds


def test_a_step_that_not_all_seeds_made_is_no_mean(runs, tmp_path):
    shorter = write_run(tmp_path / "d", "grpo", 2, steps=2)
    page = report.build_comparison([*runs, shorter], tmp_path / "p.html").read_text()
    assert len(figures(page)["Reward"].lines["name=grpo"]) == 2


def test_the_page_has_pictures_beside_it(runs, tmp_path):
    report.build_comparison(runs, tmp_path / "page.html", pictures=True)
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert {"training-reward.png", "evaluation-science-avg-4.png"} <= names


@pytest.mark.parametrize("chosen", [[0], [0, 0]])
def test_fewer_than_two_runs_are_refused(runs, tmp_path, chosen):
    with pytest.raises(InputError, match="two runs or more"):
        report.build_comparison([runs[i] for i in chosen], tmp_path / "page.html")
