"""Pages from run folders: what happened in a run, in one file that works offline."""

from jaxrl_post.report.alerts import Alert, alerts
from jaxrl_post.report.card import model_card
from jaxrl_post.report.comparison import build_comparison
from jaxrl_post.report.evaluations import Comparison, GainSplit, compare_evaluations
from jaxrl_post.report.page import build
from jaxrl_post.report.run import Run, read_run

__all__ = [
    "Alert",
    "Comparison",
    "GainSplit",
    "Run",
    "alerts",
    "build",
    "build_comparison",
    "compare_evaluations",
    "model_card",
    "read_run",
]
