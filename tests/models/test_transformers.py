"""What `models.save` writes, opened by transformers; needs torch, see scripts/."""

from __future__ import annotations

import numpy as np
import pytest
from goldens import GOLDENS, NAMES

from jaxrl_post import models

torch = pytest.importorskip("torch", reason="torch is no dependency of the project")


@pytest.mark.parametrize("limit", [2**30, 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_opens_it(name, limit, tmp_path):
    from transformers import AutoModelForCausalLM

    policy, params, _ = models.load(GOLDENS / name)
    path = models.save(policy, params, None, tmp_path / "out", max_shard_bytes=limit)
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with np.load(GOLDENS / name / "golden.npz") as golden, torch.no_grad():
        logits = model(torch.from_numpy(golden["tokens"])).logits
        np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)
