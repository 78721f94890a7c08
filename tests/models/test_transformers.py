"""What `models.save` writes, opened by transformers; needs torch, see scripts/."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe"])
def test_peft_opens_an_adapter(name, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is no dependency of the project")
    from transformers import AutoModelForCausalLM

    lora = models.Lora(rank=2, alpha=3)
    policy, params, _ = models.load(GOLDENS / name, adapter=lora)

    def awake(path, x):
        return x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(
            x.dtype
        ) * (path[-1].key == "lora_b")

    params = jax.tree_util.tree_map_with_path(awake, params)
    tokens = np.arange(24).reshape(2, 12)
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    hidden, _ = policy.hidden(params, tokens, positions, np.ones_like(tokens))
    ours = hidden @ policy.unembedding(params).T
    path = models.save_adapter(policy, params, None, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(GOLDENS / name, dtype="float32")
    with torch.no_grad():
        plain = base(torch.from_numpy(tokens)).logits.numpy()
        model = peft.PeftModel.from_pretrained(base, path)
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits - plain).max() > 1e-2
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)
