"""What preflight predicts, against what a run compiles for its real arrays."""

from __future__ import annotations

import pytest

from jaxrl_post import preflight, training
from jaxrl_post.preflight import shapes
from jaxrl_post.preflight.training import compile_training
from jaxrl_post.training.offload import LayoutKeepingJit
from jaxrl_post.training.setup import open_mesh


@pytest.fixture
def mesh_config(tiny_config):
    def make(**sections):
        of_training = {"steps": 1, "prompts_per_step": 8, "group_size": 2}
        return tiny_config(
            training={**of_training, **sections.pop("training", {})},
            mesh={"data": 2, "fsdp": 4},
            evaluation={},
            **sections,
        )

    return make


@pytest.fixture
def compiled_by_runs(monkeypatch):
    """The updates that runs compile, as the compiler sees them."""
    programs = []
    call = LayoutKeepingJit.__call__

    def note(self, state, batch):
        programs.append(self.lower(state, batch).compile())
        return call(self, state, batch)

    monkeypatch.setattr(LayoutKeepingJit, "__call__", note)
    return programs


@pytest.mark.parametrize(
    ("training_section", "lora", "logits_rows"),
    [
        ({}, None, 12),  # all of a shard's tokens: two responses of 6
        ({"micro_batch_tokens_per_shard": 22, "chunk_size": 3}, None, 3),
        ({}, {"rank": 2, "base_dtype": "int8"}, 12),
    ],
)
def test_bytes_equal_those_of_the_real_run(
    mesh_config, compiled_by_runs, training_section, lora, logits_rows
):
    """And no array, nor what devices exchange, has the logits of more tokens at once
    than a chunk has."""
    config = mesh_config(training=training_section, model={"lora": lora})
    training.run(config)
    real = compiled_by_runs[0].memory_analysis()
    topology = preflight.open_topology("cpu:8")
    sizes, _ = shapes.find_model(config.model.path)
    mesh = open_mesh(config, devices=topology.devices)
    (update,) = compile_training(shapes.Shapes.of(config, sizes, mesh))
    assert update.bytes["arguments"] == real.argument_size_in_bytes
    assert update.bytes["outputs"] == real.output_size_in_bytes
    assert update.bytes["aliases"] == real.alias_size_in_bytes
    assert update.bytes["temp"] == real.temp_size_in_bytes
    assert update.logits_rows == logits_rows
