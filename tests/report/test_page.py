"""The page: complete, self-contained, well-formed, whatever the run left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from jaxrl_post import report
from jaxrl_post.errors import InputError
from jaxrl_post.training.metrics import MetricsWriter

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Checks that every element is closed; gathers headings and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page(run_dir):
    text = report.build(run_dir).read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    outline.close()
    assert outline.open == []
    assert not {"src", "href", "onclick"} & set(outline.attributes)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    return text, " ".join(outline.text)


def write(run_dir, *rows):
    with MetricsWriter(run_dir) as writer:
        for row in rows:
            writer.write(row)


@pytest.fixture
def run_dir(tmp_path):
    """A run of thirty steps with everything in it."""
    run_dir = tmp_path / "a <b> run"
    base = {"eval/science/avg@4": 0.25, "eval/science/avg@4/low": 0.2}
    base |= {"eval/science/avg@4/high": 0.3, "eval/science/parsed": 0.5}
    final = base | {"eval/science/avg@4": 0.75, "eval/science/parsed": 1.0}
    rows = [{"step": 0, **base}]
    for step in range(1, 31):
        row = {
            "step": step,
            "reward/mean": step / 30,
            "length/mean": 30.0 - step / 5,
            "entropy": 1 / step,
            "reference/kl": 0.01 * step,
            "loss": float("nan") if step == 7 else 0.1,
            "throughput/generated_tokens_per_second": 1000.0,
            "throughput/trained_tokens_per_second": 3000.0,
            "time/generate": 30.0,
            "time/update": 90.0,
            "information/gain": 0.2,
            "information/multiplier": 1.5,
            "injection/count": 3,
            "my/own": 0.5,
        }
        rows.append(row | (final if step == 30 else {}))
    write(run_dir, *rows)
    config = "model: {path: science_base}\nrecipe: {name: <pgpo>}\n"
    (run_dir / "config.yaml").write_text(config + "training: {steps: 40}\n")
    (run_dir / "completions").mkdir()
    for step in (1, 15, 30):
        sequences = [
            {
                "step": step,
                "prompt_id": f"q{index // 2}",
                "prompt": f"<script>q{index // 2}</script>",
                "response": f"answer {index} & of step {step}",
                "reward": None if index == 0 else 0.5,
                "success": None if index == 0 else index % 2 == 1,
                "feedback": "mind the <unit>" if index == 2 else None,
                "advantage": -0.25,
            }
            for index in range(20)
        ]
        lines = [json.dumps(sequence) for sequence in sequences]
        path = run_dir / "completions" / f"step_{step:06d}.jsonl"
        path.write_text("\n".join(lines) + '\n{"torn')
    return run_dir


def test_every_panel_with_data_is_there(run_dir):
    text, words = page(run_dir)
    for title in (
        "a <b> run",
        "30 of 40",
        "Reward",
        "Response length, tokens",
        "Entropy, nats per token",
        "KL, nats per token",
        "Tokens per second",
        "Where the time went",
        "Information gain, nats",
        "Teacher samples per step",
        "Further metrics",
        "my/own",
        "science",
    ):
        assert title in words, title
    for absent in ("Gradient norm", "Truncated", "Reprompted"):
        assert absent not in words
    assert "1:00:00" in words  # thirty times 30 s + 90 s


def test_base_and_final_stand_side_by_side(run_dir):
    text, words = page(run_dir)
    assert "0.250" in words and "0.750" in words and "+0.500" in words
    assert "0.20–0.30" in words and "Step 30" in words
    # 0.5 * 0.5 -> 1.0 * 0.75
    assert "+0.312 comes from answers that parse, +0.188" in words
    assert "polygon" in text


def test_completions_of_the_first_and_the_last_step(run_dir):
    text, words = page(run_dir)
    assert "<script>q0</script>" in words and "&lt;script&gt;q0" in text
    assert "answer 0 & of step 1" in words and "answer 10 & of step 30" in words
    assert "of step 15" not in words
    assert "answer 1 &" not in words  # the second of its prompt
    assert "mind the <unit>" in words and "not judged" in words
    assert "advantage -0.25" in words


@pytest.mark.parametrize("rows", [[], [{"step": 0}], [{"step": 1, "loss": 0.5}]])
def test_a_run_that_has_hardly_begun(tmp_path, rows):
    write(tmp_path, *rows)
    _, words = page(tmp_path)
    assert ("No step has been finished yet" in words) == (not rows)
    assert ("Loss" in words) == (len(rows) == 1 and "loss" in rows[0])


def test_a_config_alone_and_the_base_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: {name: grpo}")
    assert "grpo" in page(tmp_path)[1]
    write(tmp_path, {"step": 0, "eval/<science>/avg@4": 0.25})
    _, words = page(tmp_path)
    assert "Base" in words and "<science>" in words and "Gain" not in words


def test_metrics_that_are_never_finite_or_no_numbers(tmp_path):
    write(tmp_path, {"step": 1, "loss": float("nan"), "entropy": None, "note": "hi"})
    _, words = page(tmp_path)
    assert "Loss" not in words and "note" not in words


def test_the_first_metric_of_a_later_step_and_gaps_are_drawn(tmp_path):
    write(tmp_path, {"step": 1}, {"step": 2, "loss": 0.5}, {"step": 4, "loss": None})
    assert "Loss" in page(tmp_path)[1]


@pytest.mark.parametrize("make", [False, True])
def test_what_is_no_run_is_refused(tmp_path, make):
    path = tmp_path / "elsewhere"
    if make:
        path.mkdir()
    with pytest.raises(InputError, match="elsewhere: .*run"):
        report.build(path)


def test_every_chart_is_a_picture_too(run_dir):
    report.build(run_dir, pictures=True)
    names = {path.name for path in (run_dir / "report").iterdir()}
    assert "rollouts-and-teacher-samples-reward.png" in names
    assert "information-from-the-teacher-step-multiplier.png" in names
    for path in (run_dir / "report").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_changes_with_the_colour_scheme_and_the_width(run_dir):
    text, _ = page(run_dir)
    assert "prefers-color-scheme: dark" in text and "max-width: 640px" in text
    assert 'name="viewport"' in text


def test_a_conversation_is_shown_as_its_turns(tmp_path):
    write(tmp_path, {"step": 1})
    (tmp_path / "completions").mkdir()
    sequence = {
        "prompt_id": 1,
        "prompt": [{"role": "system", "content": "Be brief."}, {"content": "Why?"}],
        "response": "Because.",
    }
    path = tmp_path / "completions" / "step_000001.jsonl"
    path.write_text(json.dumps(sequence) + "\n")
    assert "Be brief.\n\nWhy?" in page(tmp_path)[1]


# Best and worst, token by token -------------------------------------------------------


def write_completions(run_dir, rows):
    write(run_dir, {"step": 1})
    (run_dir / "completions").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "completions" / "step_000001.jsonl").write_text(lines)


def test_best_and_worst_of_the_last_step(tmp_path):
    rewards = [0.5] * 20 + [1.0, -1.0, None]
    rows = [
        {"prompt_id": "q", "response": f"text {i}.", "reward": reward}
        for i, reward in enumerate(rewards)
    ]
    write_completions(tmp_path, rows)
    _, words = page(tmp_path)
    best, _, worst = words.partition("Best of step 1")[2].partition("Worst of step 1")
    assert "text 20." in best and "text 21." not in best
    assert "text 21." in worst and "text 20." not in worst
    assert "text 22." not in words


def test_tokens_are_coloured_by_what_the_teacher_would_change(tmp_path):
    row = {
        "prompt_id": "q",
        "response": "a<b",
        "pieces": ["a", "<", "b"],
        "logps": [-1.0, -4.0, -0.5],
        "teacher_logps": [-1.0, -1.0, -2.0],
    }
    plain = [{"prompt_id": f"p{i}", "response": "x"} for i in range(9)]
    write_completions(tmp_path, [*plain, row])  # which comes first for all that
    text, words = page(tmp_path)
    assert '<span class="up" style="--a:1.00" title="+3.00">&lt;</span>' in text
    assert '<span class="down" style="--a:0.50" title="-1.50">b</span>' in text
    assert "log(teacher / student)" in words


def test_tokens_without_a_number_each_are_shown_plain(tmp_path):
    row = {"response": "ab", "pieces": ["ab"], "logps": [], "teacher_logps": [0.0]}
    write_completions(tmp_path, [{"prompt_id": "q", **row}])
    text, _ = page(tmp_path)
    assert '<div class="text">ab</div>' in text


# In a browser -------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.slow
def test_a_phone_needs_no_scrolling_sideways(run_dir, tmp_path):
    """The page tells its own width; one chart and the table are 320 pixels at most."""
    text, _ = page(run_dir)
    probe = "<script>document.title=document.documentElement.scrollWidth</script>"
    narrow = tmp_path / "narrow.html"
    # Headless windows have a least width; a frame has none.
    frame = tmp_path / "frame.html"
    frame.write_text(text.replace("</body>", f"{probe}</body>"))
    narrow.write_text(
        '<iframe id="f" src="frame.html" width="360" height="700"></iframe><script>'
        "f.onload=()=>{document.title=f.contentDocument.title;"
        "document.body.dataset.width=f.contentDocument.title}</script>"
    )
    done = browse("--allow-file-access-from-files", "--dump-dom", narrow.as_uri())
    assert 'data-width="360"' in done.stdout, done.stdout[-500:]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.slow
def test_light_and_dark_are_drawn(run_dir, tmp_path):
    from matplotlib.image import imread

    path = report.build(run_dir).as_uri()
    means = []
    for flags in ([], ["--blink-settings=preferredColorScheme=0"]):
        picture = tmp_path / f"{len(flags)}.png"
        browse(f"--screenshot={picture}", "--window-size=800,1200", *flags, path)
        means.append(imread(picture)[..., :3].mean())
    assert max(means) > 0.8 and min(means) < 0.3, means


def browse(*arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [CHROMIUM, *flags, "--virtual-time-budget=3000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
