"""Files that others made: none runs code, none allocates what it merely claims."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_post import models
from jaxrl_post.errors import InputError
from jaxrl_post.generation import tokenize_prompts
from jaxrl_post.isolation import JudgePool, templates
from jaxrl_post.models.checkpoints import EMBEDDED, open_checkpoint
from jaxrl_post.models.ggufheader import check_header

LLAMA = Path(__file__).parents[1] / "goldens" / "models" / "llama"
BASE = EMBEDDED["science_base"]
MESSAGES = [[{"role": "user", "content": "q"}]]


@pytest.fixture
def folder(tmp_path):
    """A copy of a model without a tokenizer."""
    path = tmp_path / "model"
    shutil.copytree(LLAMA, path)
    return path


def with_code(folder: Path, marker: Path) -> None:
    """Python that leaves a mark, under every name that transformers looks for."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(code)
    for name, kind in (
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        own = "evil.Evil"
        values["auto_map"] = {kind: [own, own] if "Tokenizer" in kind else own}
        if kind == "AutoTokenizer":
            values["tokenizer_class"] = "Evil"
        path.write_text(json.dumps(values))


def test_code_beside_a_model_does_not_run(folder, tmp_path):
    marker = tmp_path / "it ran"
    with_code(folder, marker)
    with pytest.raises(InputError, match="Tokenizers that bring code are not run"):
        models.load(folder)
    assert not marker.exists()


def test_code_is_not_run_where_somebody_could_be_asked(folder, tmp_path):
    """transformers asks at a terminal unless it was told no beforehand."""
    marker = tmp_path / "it ran"
    with_code(folder, marker)
    code = f"from jaxrl_post import models; models.load({str(folder)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 20, capture_output=True, text=True
    )
    assert "InputError" in result.stderr and "[y/N]" not in result.stdout
    assert not marker.exists()


def test_a_pickle_is_not_opened(folder, tmp_path):
    import pickle

    marker = tmp_path / "it ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle, which may"):
        models.load(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7, []]
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="no safetensors file of this folder"):
        _ = open_checkpoint(folder).shapes


def test_a_small_safetensors_file_that_claims_a_terabyte(folder):
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    ).encode()
    for data in (
        struct.pack("<Q", len(header)) + header,
        struct.pack("<Q", 2**40) + header,  # the header itself
        struct.pack("<Q", 2**64 - 1) + header,
    ):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="cannot be read"):
            models.load(folder)


def test_a_config_that_claims_a_billion_layers(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**values, "num_hidden_layers": 2**30})
    )
    with pytest.raises(InputError, match="they do not belong together"):
        models.load(folder)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(shape, kind=0, offset=0) -> bytes:
    return (
        text(b"output_norm.weight")
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


def header(tensors=(), values=(), counts=None) -> bytes:
    counts = counts or (len(tensors), len(values))
    return b"".join([b"GGUF", struct.pack("<IQQ", 3, *counts), *values, *tensors])


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"GGUF", "it ends at byte 4"),
        (b"GGML" + bytes(100), "does not begin with GGUF"),
        (b"GGUF" + bytes(100), "version 0 is not supported"),
        (header(counts=(0, 2**60)), "it ends at byte 24"),
        (header(counts=(2**60, 0)), "it ends at byte 24"),
        (header(values=[struct.pack("<Q", 2**60)]), f"{2**60} more were announced"),
        (
            header(values=[text(b"k") + struct.pack("<IIQ", 9, 0, 2**40)]),
            "an array of 1099511627776 values is too long",
        ),
        (
            header(values=[text(b"k") + struct.pack("<IIQ", 9, 12, 2**20)]),
            f"{2**23} more were announced",
        ),
        (
            header(values=[text(b"k") + struct.pack("<IIQ", 9, 9, 1)]),
            "a value has the unknown type 9",  # arrays of arrays
        ),
        (header(values=[text(b"k") + struct.pack("<I", 99)]), "unknown type 99"),
        (
            header(values=[text(b"general.alignment") + struct.pack("<II", 4, 0)]),
            "alignment 0 is no power of two",
        ),
        (header([tensor([2**38])]), "ends at byte 1099511627872 of 74"),
        (header([tensor([2**32, 2**32])]), "ends at byte"),  # 0 in 64 bits
        (header([tensor([1], offset=2**63)]), "ends at byte"),
        (header([tensor([1], kind=77)]), "has the unknown type 77"),
        (header([tensor([1] * 5)]), "has 5 axes, not 1 to 4"),
        (header([tensor([])]), "has 0 axes, not 1 to 4"),
        (header([tensor([8, 0])]), "is empty"),
    ],
)
def test_a_gguf_header_stays_within_its_file(tmp_path, data, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        check_header(path)
    with pytest.raises(InputError, match="no GGUF file, or not a whole one"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ self._TemplateReference__context.eval_ctx.environment.loader.x }}",
        "{{ messages.clear() }}{{ raise_exception('no') }}",
        "{% for a in range(10**9) %}{{ a }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% if",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = open_checkpoint(tmp_path / "model").tokenizer()
    assert tokenizer.chat_template == template
    with pytest.raises(InputError, match="chat template cannot render") as error:
        tokenize_prompts(tokenizer, MESSAGES)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "template, words, seconds",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
            "{% endfor %}",
            "time-out",
            1,
        ),
        (
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "RecursionError",
            60,
        ),
        ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "MemoryError", 60),
        (
            "{{ 'a' * 2**25 }}",
            "a text of 33554432 characters, more than 10000000",
            60,
        ),
    ],
)
def test_a_chat_template_takes_no_more_than_it_may(
    template, words, seconds, monkeypatch
):
    tokenizer = open_checkpoint("science_base").tokenizer()
    tokenizer.chat_template = template
    with JudgePool(1, timeout=seconds, memory_limit=2**31, warn=False) as pool:
        monkeypatch.setattr(templates, "_pool", lambda: pool)
        with pytest.raises(InputError, match="chat template cannot render") as error:
            tokenize_prompts(tokenizer, MESSAGES)
    assert words in str(error.value)


def test_a_template_gets_what_transformers_gives_it():
    """Special tokens, arguments and messages, as where it is rendered at home."""
    tokenizer = open_checkpoint("science_base").tokenizer()
    tokenizer.chat_template = (
        "{{ eos_token }}{% for m in messages %}{{ m|tojson }}{% endfor %}"
        "{{ bos_token is defined }}{{ add_generation_prompt }}{{ extra }}"
    )
    message = {"role": "user", "content": "é", "name": None}
    text = tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True, extra=7
    )
    assert '"content": "é"' in text and text.endswith("True7")
    assert templates.render(tokenizer, [[message]], {"extra": 7}) == [text]


def test_a_template_cannot_change_the_conversation():
    tokenizer = open_checkpoint("science_base").tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    before = [[dict(message) for message in turns] for turns in MESSAGES]
    tokenize_prompts(tokenizer, MESSAGES)
    assert MESSAGES == before
