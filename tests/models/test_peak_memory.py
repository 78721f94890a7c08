"""Loading never holds more than the devices do, and one tensor: peak RSS, measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HELPERS = Path(__file__).parents[1] / "helpers"
ROOT = Path(__file__).parents[2]
WIDTH, MLP, LAYERS, VOCAB = 1024, 4096, 8, 16000

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with weights in five files, and their bytes."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files, size = {}, 0

    def write(name, shapes):
        nonlocal size
        tensors = {k: np.ones(shape, np.float32) for k, shape in shapes.items()}
        save_file(tensors, folder / name)
        size += sum(x.nbytes for x in tensors.values())
        files.update(dict.fromkeys(tensors, name))

    ends = ("model.embed_tokens", "lm_head")
    shapes = {f"{name}.weight": (VOCAB, WIDTH) for name in ends}
    write("ends.safetensors", {**shapes, "model.norm.weight": (WIDTH,)})
    layer = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (256, WIDTH),
        "self_attn.v_proj": (256, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }
    for first in range(0, LAYERS, 2):
        write(
            f"layers{first}.safetensors",
            {
                f"model.layers.{i}.{name}.weight": shape
                for i in (first, first + 1)
                for name, shape in layer.items()
            },
        )
    index = {"weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, size


def load(model, sizes, *process):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, HELPERS / "load_peak.py", model, json.dumps(sizes), *process],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def check(found, held):
    """`found` held as much, and never more than a tensor beside it."""
    # The scales of the norms are whole on every device.
    assert held < found["held"] < 1.001 * held
    assert found["leaf"] < 0.5 * held
    assert found["peak"] < found["base"] + found["held"] + found["leaf"]


def test_one_process_holds_its_devices_parts_and_one_tensor(model):
    folder, size = model
    found = result(load(folder, (1, 4, 2)))
    check(found, size)


@pytest.mark.slow
def test_each_of_two_processes_holds_half(model):
    folder, size = model
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [load(folder, (1, 2, 1), str(rank), "2", address) for rank in range(2)]
    for process in started:
        check(result(process), size / 2)
