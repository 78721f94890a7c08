"""What the public libraries mean by the same names, as keyword arguments.

Each entry holds only arguments on which that library is known to differ from others;
use it by `advantages.group_relative(rewards, **presets.ADVANTAGES["verl"])`. What an
argument cannot express is said beside the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]

ADVANTAGES: Preset = {
    "trl": {"scale": "std", "ddof": 1, "eps": 1e-4},
    # verl gives a group of one its raw reward, here it is 0.
    "verl": {"scale": "std", "ddof": 1, "eps": 1e-6},
    "nemo": {"scale": "std", "ddof": 1, "eps": 1e-6, "leave_one_out": True},
    "openrlhf": {"scale": "std", "ddof": 1, "eps": 1e-9},
    # Centred by default; its "standard" mode is this with scale="std".
    "open_instruct": {"scale": "none", "ddof": 0, "eps": 1e-8},
    "slime": {"scale": "std", "ddof": 1, "eps": 1e-6},
    "areal": {"scale": "std", "ddof": 0, "eps": 1e-5},
    "prime": {"scale": "none"},
    "dr_grpo": {"scale": "none"},
}
"""For `advantages.group_relative`."""

POLICY_GRADIENT: Preset = {
    "trl": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "log_ratio_clamp": None,
    },
    "verl": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
    },
    "nemo": {"dual_clip": None, "log_ratio_clamp": None},
    "openrlhf": {"dual_clip": None, "log_ratio_clamp": 20.0},
    "open_instruct": {"dual_clip": None, "log_ratio_clamp": None},
    "slime": {"dual_clip": None, "log_ratio_clamp": None},
}
"""For `losses.clipped_policy_gradient`."""

CLIPPED_IMPORTANCE: Preset = {
    # The cap is TRL's epsilon_high, an absolute number; 5.0 is what its docs advise.
    "trl": {"absolute_cap": 5.0},
    "verl": {"clip_low": 0.2, "clip_high": 0.2},
    "nemo": {"clip_low": 0.2, "clip_high": 0.2},
    "open_instruct": {"clip_low": None, "clip_high": 0.2},
    "slime": {"clip_low": 0.2, "clip_high": 0.2},
}
"""For `losses.clipped_importance_policy_gradient`: which sides are clipped, and how.
The widths are every library's own setting; 0.2 stands for it."""

REFERENCE_KL: Preset = {
    "trl": {"estimator": "k3", "clamp": None},
    "verl": {"estimator": "k3", "clamp": (20.0, 10.0)},
    "nemo": {"estimator": "k3", "clamp": (20.0, 10.0)},
    "openrlhf": {"clamp": (None, 10.0)},
    "open_instruct": {"clamp": (40.0, None)},
    "slime": {"estimator": "k3", "clamp": None},
}
"""For `losses.reference_kl`. verl clamps its k3 only ("low_var_kl"); OpenRLHF every
estimator; slime its "low_var_kl" (result, 10.0) but not its "k3"."""
