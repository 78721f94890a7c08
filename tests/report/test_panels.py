"""What a run of each kind shows: which charts, with which lines, of which values."""

from __future__ import annotations

import json
import re

import pytest
from report_page import facts, figures

from jaxrl_post import report
from jaxrl_post.training.metrics import MetricsWriter

CONFIG = """
task: {name: science}
recipe: {name: grpo}
optimizer: {learning_rate: 0.0003}
training: {steps: 40, prompts_per_step: 16, group_size: 8}
sampling: {temperature: 1.0}
"""

ROLLOUTS = {
    "reward/mean": 0.5,
    "reward/zero_std_groups": 0.375,
    "length/mean": 20.0,
    "time/generate": 2.0,
}


def build(run_dir, rows, config=CONFIG, completions=()):
    """The text of a run's page."""
    run_dir.mkdir(exist_ok=True)
    with MetricsWriter(run_dir) as writer:
        for row in rows:
            writer.write(row)
    (run_dir / "config.yaml").write_text(config)
    if completions:
        (run_dir / "completions").mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in completions)
        (run_dir / "completions" / "step_000001.jsonl").write_text(lines)
    return report.build(run_dir).read_text(encoding="utf-8")


def notes(page):
    return re.findall(r'<p class="note">(.*?)</p>', page)


def titles(charts, section):
    return [chart.title for chart in charts.values() if chart.section == section]


def values(chart, label=""):
    return [round(y, 2) for _, y in chart.lines[label]]


# PGPO ---------------------------------------------------------------------------------


def pgpo_rows(multipliers=(2.0, 1.5, 0.8, 2.0)):
    for step, multiplier in enumerate(multipliers, start=1):
        yield {
            "step": step,
            **ROLLOUTS,
            "information/gain": 0.25 * step - 0.5,
            "information/student_entropy": 1.5 - 0.25 * step,
            "information/teacher_entropy": 0.25,
            "information/multiplier": multiplier,
            "information/sensitivity": 1.0 + 0.25 * step,
            "information/capped": float(multiplier >= 2.0),
            "information/negative": float(step == 1),
        }


def test_information_is_shown_with_both_entropies_and_the_sensitivity(tmp_path):
    charts = figures(build(tmp_path, pgpo_rows()))
    assert titles(charts, "Information from the teacher") == [
        "Information gain, nats",
        "Entropy, nats per token",
        "Step multiplier",
        "Sensitivity, adapted",
        "Capped and negative, share of steps",
    ]
    assert values(charts["Information gain, nats"]) == [-0.25, 0.0, 0.25, 0.5]
    entropy = charts["Entropy, nats per token"]
    assert entropy.legend == {"student": "0.500", "teacher": "0.250"}
    assert values(entropy, "student") == [1.25, 1.0, 0.75, 0.5]
    assert values(entropy, "teacher") == [0.25] * 4
    assert values(charts["Sensitivity, adapted"]) == [1.25, 1.5, 1.75, 2.0]


def test_the_multiplier_has_its_cap_where_a_step_reached_it(tmp_path):
    capped = figures(build(tmp_path / "a", pgpo_rows()))["Step multiplier"]
    assert values(capped) == [2.0, 1.5, 0.8, 2.0]
    assert capped.level == pytest.approx(2.0, abs=0.01)
    assert capped.legend == {"": "2.000", "cap": "2.000"}
    free = figures(build(tmp_path / "b", pgpo_rows((1.1, 0.9))))["Step multiplier"]
    assert free.level is None and free.legend == {"": "0.900"}


def test_a_step_with_few_capped_updates_does_not_tell_the_cap(tmp_path):
    row = {"step": 1, "information/multiplier": 1.6, "information/capped": 0.5}
    assert figures(build(tmp_path, [row]))["Step multiplier"].level is None


def test_shares_of_capped_and_negative_steps_are_of_the_run(tmp_path):
    page = build(tmp_path, pgpo_rows())
    chart = figures(page)["Capped and negative, share of steps"]
    assert chart.legend == {"capped": "50.0%", "negative": "25.0%"}
    assert values(chart, "capped") == [1, 0, 0, 1]
    assert any("means over the run" in note for note in notes(page))


def test_teacher_and_student_stand_at_the_steps_that_measured_them(tmp_path):
    rows = [
        {
            "step": step,
            "teacher/reprompted": 0.75,
            "teacher/demonstrated": 0.5,
            "teacher/feedback": 0.25,
            "teacher/success_groups": 0.625,
            "teacher/contexts": 9.0,
        }
        for step in range(1, 41)
    ]
    for step in (1, 20, 40):
        rows[step - 1] |= {
            "teacher/accuracy": 0.5 + step / 100,
            "teacher/student_accuracy": 0.25,
        }
    page = build(tmp_path, rows)
    charts = figures(page)
    assert titles(charts, "Teacher") == [
        "Accuracy on the step's questions",
        "Rollouts with a teacher's context, share",
        "Groups with a success, share",
    ]
    accuracy = charts["Accuracy on the step's questions"]
    assert accuracy.legend == {"student": "0.250", "teacher": "0.900"}
    expected = [(1, 0.51), (20, 0.7), (40, 0.9)]
    assert accuracy.dots["teacher"] == [pytest.approx(p, abs=0.1) for p in expected]
    assert [round(y, 2) for _, y in accuracy.dots["teacher"]] == [0.51, 0.7, 0.9]
    shares = charts["Rollouts with a teacher's context, share"].legend
    assert shares == {"any": "0.750", "demonstration": "0.500", "feedback": "0.250"}
    assert charts["Groups with a success, share"].legend == {"": "0.625"}
    assert titles(charts, "Further metrics") == ["teacher/contexts"]
    assert any("at some steps only" in note for note in notes(page))


# HAPO ---------------------------------------------------------------------------------


def hapo_rows(steps=4):
    yield {
        "step": 0,
        "demonstrations/available": 0.932,
        "demonstrations/rejected": 0.041,
        "demonstrations/too_long": 0.017,
        "demonstrations/missing": 0.01,
    }
    for step in range(1, steps + 1):
        bins = dict.fromkeys((f"{x / 10:.1f}" for x in range(10)), 0.0)
        bins |= {"0.1": 1 - step / 10, "0.9": step / 10}
        yield {
            "step": step,
            **ROLLOUTS,
            "injection/count": 16 - 4 * (step - 1),
            "injection/rate": 1.0 - 0.25 * (step - 1),
            "injection/probability": 0.9,
            "injection/confidence": 0.1 * step,
            "injection/zero_std_groups": 0.125,
            **{f"injection/confidence_bins/{low}": x for low, x in bins.items()},
        }


def test_the_papers_three_panels_stand_together(tmp_path):
    page = build(tmp_path, hapo_rows())
    charts = figures(page)
    triptych = ["Reward", "Response length, tokens", "Teacher samples per step"]
    assert titles(charts, "Rollouts and teacher samples") == triptych
    frame = re.search(r'<div class="grid together">(.*?)</div><p', page, re.DOTALL)
    assert list(figures(frame[1])) == triptych
    assert values(charts["Reward"]) == [0.5] * 4
    assert values(charts["Response length, tokens"]) == [20.0] * 4
    assert values(charts["Teacher samples per step"]) == [16, 12, 8, 4]
    assert any("the teacher wrote counts in neither" in note for note in notes(page))


def test_without_injection_reward_and_length_are_training_alone(tmp_path):
    page = build(tmp_path, [{"step": 1, **ROLLOUTS}, {"step": 2, **ROLLOUTS}])
    charts = figures(page)
    assert {charts[x].section for x in ("Reward", "Response length, tokens")} == {
        "Training"
    }
    assert notes(page) == []
    assert charts["Groups of equal rewards, share"].legend == {"": "0.375"}


def test_the_gate_is_shown_beside_its_formula(tmp_path):
    page = build(tmp_path, hapo_rows())
    charts = figures(page)
    assert titles(charts, "Injected solutions") == [
        "Groups with a teacher sample, share",
        "Mean confidence of the groups",
        "Confidence, share of the groups",
    ]
    gate = charts["Groups with a teacher sample, share"]
    assert values(gate, "measured") == [1.0, 0.75, 0.5, 0.25]
    assert values(gate, "binomial formula") == [0.9] * 4
    assert any("a gate without memory" in note for note in notes(page))
    confidence = values(charts["Mean confidence of the groups"])
    assert confidence == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.011)
    alike = charts["Groups of equal rewards, share"]
    assert alike.legend == {"before injection": "0.375", "after injection": "0.125"}


def test_confidence_is_a_histogram_over_the_steps(tmp_path):
    cells = figures(build(tmp_path, hapo_rows()))["Confidence, share of the groups"]
    assert list(cells.cells) == [
        "step 1, 0.1–0.2: 90.0%",
        "step 1, 0.9–1: 10.0%",
        "step 2, 0.1–0.2: 80.0%",
        "step 2, 0.9–1: 20.0%",
        "step 3, 0.1–0.2: 70.0%",
        "step 3, 0.9–1: 30.0%",
        "step 4, 0.1–0.2: 60.0%",
        "step 4, 0.9–1: 40.0%",
    ]


def test_what_became_of_the_demonstrations_stands_in_the_head(tmp_path):
    page = build(tmp_path, hapo_rows())
    head = facts(page)
    assert head["Demonstrations"] == "93.2%" and head["… rejected"] == "4.1%"
    assert head["… too long"] == "1.7%" and head["… missing"] == "1.0%"
    assert not [title for title in figures(page) if "demonstrations" in title]
    assert "Demonstrations" not in facts(build(tmp_path / "b", pgpo_rows()))


def test_every_metric_is_shown_once(tmp_path):
    rows = [
        {**hapo, **pgpo, "loss": 0.1, "my/own": 1.0, "teacher/kl": 0.5, "time/x": 1.0}
        for hapo, pgpo in zip(list(hapo_rows())[1:], pgpo_rows(), strict=True)
    ]
    charts = figures(build(tmp_path, rows))
    shown = sum(len({*c.lines, *c.dots}) for c in charts.values())
    in_a_histogram = 10
    assert shown + in_a_histogram == len(set(rows[0]) - {"step", "time/generate"})
    assert titles(charts, "Further metrics") == ["my/own", "time/x"]


# Stages, and runs without rollouts ----------------------------------------------------

STAGED = (
    CONFIG
    + """
stages:
  warm:
    recipe: {name: sft}
    optimizer: {learning_rate: 0.001}
    training: {steps: 20}
  rl: {}
"""
)


def imitation(step):
    return {
        "step": step,
        "loss": 2.0,
        "time/update": 1.0,
        "throughput/trained_tokens_per_second": 1e3,
    }


def staged_rows(last=60):
    yield {"step": 0, "eval/science/avg@4": 0.25}
    for step in range(1, last + 1):
        row = imitation(step) | {"stage": 1 if step <= 20 else 2}
        if step > 20:
            row |= {**ROLLOUTS, "loss": 0.5}
        yield row | ({"eval/science/avg@4": 0.5} if step in (20, 60) else {})


def test_a_stage_begins_at_a_mark(tmp_path):
    page = build(tmp_path, staged_rows(), STAGED)
    charts = figures(page)
    for title in ("Reward", "Loss", "Tokens per second", ""):  # "": an evaluation
        ((at, name),) = charts[title].marks
        assert name == "rl" and at == pytest.approx(20.5, abs=0.2), title
    assert charts["Reward"].lines[""][0][0] == pytest.approx(21, abs=0.2)
    assert values(charts["Loss"]) == [2.0] * 20 + [0.5] * 40
    head = facts(page)
    assert head["Stages"] == "warm 1–20, rl 21–60"
    assert head["Steps"] == "60 of 60"
    assert head["Learning rate"] == "0.001, 0.0003"
    assert head["Batch"] == "16 prompts × 8" and head["Temperature"] == "1.0"
    assert "<p>sft, then grpo on science,</p>" in page
    assert titles(charts, "Further metrics") == []  # the number of the stage is none


def test_before_the_second_stage_nothing_is_marked(tmp_path):
    page = build(tmp_path, staged_rows(12), STAGED)
    assert all(chart.marks == [] for chart in figures(page).values())
    assert facts(page)["Stages"] == "warm 1–12"
    assert facts(page)["Steps"] == "12 of 60"


def test_stages_without_a_config_have_numbers(tmp_path):
    head = facts(build(tmp_path, staged_rows(), ""))
    assert head["Stages"] == "stage 1 1–20, stage 2 21–60" and head["Steps"] == "60"


def test_a_run_without_stages_names_none(tmp_path):
    assert "Stages" not in facts(build(tmp_path, pgpo_rows()))


def test_a_run_that_only_imitates(tmp_path):
    config = CONFIG.replace("grpo", "sft")
    completion = {"prompt_id": 1, "prompt": "q", "response": "a", "teacher": True}
    page = build(tmp_path, map(imitation, (1, 2, 3)), config, [completion])
    charts = figures(page)
    assert set(charts) == {"Loss", "Tokens per second"}
    assert values(charts["Loss"]) == [2.0] * 3
    head = facts(page)
    assert head["Batch"] == "16 prompts" and head["Steps"] == "3 of 40"
    assert "Temperature" not in head and "Demonstrations" not in head


def test_the_teachers_time_is_counted(tmp_path):
    row = {"step": 1, "time/update": 30.0, "time/teacher": 90.0}
    page = build(tmp_path, [row])
    assert re.findall(r"width:([\d.]+)%", page) == ["25.00", "75.00"]
    assert facts(page)["Time"] == "2:00"


# Completions --------------------------------------------------------------------------


def responses(page):
    """Badge and text of each response shown."""
    return re.findall(
        r'<td>(?:<span class="badge">([^<]*)</span>)?<div class="text">([^<]*)</div>',
        page,
    )


def test_what_a_teacher_wrote_is_marked(tmp_path):
    rows = [
        {"prompt_id": 0, "response": "own"},
        {"prompt_id": 1, "response": "whole", "teacher": True},
        {"prompt_id": 2, "response": "begun", "teacher_tokens": 12},
        {"prompt_id": 3, "response": "none", "teacher": False, "teacher_tokens": 0},
    ]
    page = build(tmp_path, pgpo_rows(), completions=rows)
    assert responses(page) == [
        ("", "own"),
        ("teacher", "whole"),
        ("first 12 tokens: teacher", "begun"),
        ("", "none"),
    ]


@pytest.mark.parametrize("written", [None, 5, 70])
def test_a_teachers_completion_is_among_those_shown(tmp_path, written):
    rows = [{"prompt_id": x // 8, "response": f"r{x}"} for x in range(80)]
    if written is not None:
        rows[written]["teacher"] = True
    shown = responses(build(tmp_path, pgpo_rows(), completions=rows))
    last = ("", "r40") if written is None else ("teacher", f"r{written}")
    firsts = [("", f"r{8 * x}") for x in range(5)]
    assert shown == [*firsts, last]
