"""The models of scripts/make_model_goldens.py."""

from __future__ import annotations

from pathlib import Path

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))
