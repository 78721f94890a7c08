"""The pictures of docs/report.md: pages of runs as headless Chromium draws them.

    for seed in 0 1; do
      jaxrl-post train configs/quickstart.yaml training.teacher_tokens=true \
        run.seed=$seed run.dir=runs/seed-$seed
    done
    python scripts/screenshots.py runs/seed-0 runs/seed-1

The first run gives the pictures of one run, all of them that of a comparison.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image  # which matplotlib brings

from jaxrl_post import report

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
LIMIT = 150_000
"""Bytes that a picture may have."""

DARK = "--blink-settings=preferredColorScheme=0"


def browser() -> str | None:
    """Chromium's program, where there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def only(page: str, title: str) -> str:
    """The page with one of its sections alone."""
    head, body = page.split("<main>")
    for section in re.findall(r"<section>.*?</section>", body, re.DOTALL):
        if section.startswith(f"<section><h2>{title}</h2>"):
            return f"{head}<main>{section}</main></body></html>"
    raise SystemExit(f"The page has no section {title!r}; was the run made as above?")


def draw(program: str, page: str, picture: Path, height: int, *flags: str) -> None:
    """Draws the top of a page, 1,000 wide."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(page)
        command = [program, "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--hide-scrollbars", "--virtual-time-budget=3000", *flags]
        command += [f"--window-size=1000,{height}", f"--screenshot={picture}"]
        subprocess.run([*command, path.as_uri()], check=True, capture_output=True)
    with Image.open(picture) as drawn:
        small = drawn.convert("RGB").quantize(96, dither=Image.Dither.NONE)
    small.crop((0, 0, small.width, bottom(small))).save(picture, optimize=True)
    size = picture.stat().st_size
    print(f"{picture}: {size:,} bytes")
    assert size < LIMIT, f"{picture} has more than {LIMIT:,} bytes; lower its height"


def bottom(picture: Image.Image) -> int:
    """Where what is drawn ends, and a margin below."""
    pixels = np.asarray(picture)
    used = (pixels != pixels[-1, 0]).any(axis=1).nonzero()[0]
    return min(int(used.max(initial=0)) + 20, picture.height)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws them all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--to", type=Path, default=PICTURES, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    program = browser()
    if program is None:
        print("There is no chromium on this machine; nothing was drawn.")
        return 0
    arguments.to.mkdir(parents=True, exist_ok=True)
    page = report.build(arguments.runs[0]).read_text()
    draw(program, page, arguments.to / "report.png", 1150)
    draw(program, only(page, "Completions"), arguments.to / "tokens.png", 620, DARK)
    if len(arguments.runs) > 1:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "comparison.html")
            report.build_comparison(arguments.runs, path)
            page = only(path.read_text(), "Training")
            draw(program, page, arguments.to / "comparison.png", 690)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
