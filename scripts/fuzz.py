"""Feeds broken files and odd texts to what reads them, and stops at the first surprise.

    python scripts/fuzz.py gguf --minutes 10 --log docs/evidence/fuzz.jsonl
    python scripts/fuzz.py gguf --seed 0 --only 1234     # one input again

Targets are the GGUF reader, the config loader, the dataset loader, packed tests of
programming problems and the extraction of answers. An input is a valid one mutated, or
drawn from the target's grammar; it may be accepted or refused by an `InputError`. Any
other exception, more than `HANG` seconds of processor time and more than `MEMORY` bytes
are a surprise: the input is kept, and what makes it again is printed. Input number i
depends on target, seed and i alone.
"""

from __future__ import annotations

import argparse
import base64
import faulthandler
import json
import os
import pickle
import resource
import shlex
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxrl_post.errors import InputError  # noqa: E402

HANG = 10.0
MEMORY = 2**31


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
      make: an input, from a random generator.
      run: reads it, given a folder to write it into; raises nothing but `InputError`.
    """

    make: Callable[[Random], Any]
    run: Callable[[Any, Path], None]


class Hang(BaseException):
    """The time is up; not an Exception, so that nobody takes it for a broken file."""


def fuzz(
    name: str,
    target: Target,
    folder: Path,
    *,
    seed: int = 0,
    seconds: float = 5.0,
    only: int | None = None,
) -> dict[str, Any]:
    """Runs a target on input after input; one record of how it went."""
    start, executions, refused, crash = None, 0, 0, None
    signal.signal(signal.SIGPROF, _hang)
    most = _resident() + MEMORY
    while crash is None and (start is None or time.monotonic() - start < seconds):
        number = executions if only is None else only
        data = target.make(Random(f"{name} {seed} {number}"))
        # What never returns to Python is ended by force.
        faulthandler.dump_traceback_later(20 * HANG, exit=True, file=sys.__stderr__)
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            target.run(data, folder)
            if _resident() > most:
                raise MemoryError(f"more than {MEMORY} bytes")
        except InputError:
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            crash = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        executions += 1
        # The first input paid for imports and the start of workers.
        start = start or time.monotonic()
        if crash is not None:
            kept = folder / f"crash-{name}-{seed}-{number}"
            kept.write_bytes(repr(data).encode())
            print(
                f"{crash}\ninput: {kept}\nagain: python scripts/fuzz.py {name} "
                f"--seed {seed} --only {number}",
                file=sys.stderr,
            )
        if only is not None:
            break
    faulthandler.cancel_dump_traceback_later()
    return {
        "target": name,
        "seed": seed,
        "executions": executions,
        "refused": refused,
        "crashes": int(crash is not None),
        "seconds": round(time.monotonic() - start, 1),
    }


def _hang(signum: int, frame: object) -> None:
    raise Hang(f"more than {HANG:g} s of processor time")


def _resident() -> int:
    """Bytes of memory at the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- mutations ----------------------------------------------------------------------

_NUMBERS = [0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
_NUMBERS += [2**40, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """`data` after one to eight small changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 2, 4, 8, 64)))
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:end] = rng.randbytes(end - at)
        elif kind == 2:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(_NUMBERS) % 256**size
            out[at : at + size] = value.to_bytes(size, "little")
        elif kind == 3:
            del out[at:end]
        elif kind == 4:
            out[at:at] = out[at:end]
        elif kind == 5:
            out[at:at] = rng.randbytes(end - at)
        elif kind == 6 and rng.random() < 0.3:
            del out[at:]
        elif kind == 7:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            out[at:end] = other[begin : begin + rng.choice((4, 16, 256))]
    return bytes(out)


_TEXTS = ["", " ", "a", "7", "-1", "1e400", "NaN", "\0", "\n", "\ud800", "é", "𝟙"]
_TEXTS += ["<answer>", "\\boxed{", "}", "####", "../x", "~x", "{{ x }}", "x" * 5000]


def value(rng: Random, depth: int = 3) -> Any:
    """Plain data of any kind."""
    if depth and rng.random() < 0.3:
        items = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
        if rng.random() < 0.5:
            return items
        return {rng.choice(_TEXTS): item for item in items}
    plain = [None, True, False, rng.uniform(-2, 2), float("nan"), float("inf")]
    return rng.choice(
        [*plain, rng.choice(_TEXTS), rng.choice(_NUMBERS), -rng.choice(_NUMBERS)]
    )


# ---- GGUF ---------------------------------------------------------------------------

_TOKENS = ["<end>", "a", "b", "c", "ab", "Ġ", "Ġa", "Ċ"]
_MODEL: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.context_length": 32,
    "llama.rope.freq_base": 1e4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.token_type": [3] + [1] * 7,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    "general.alignment": 32,
}
_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (8, 8),
    "output_norm.weight": (8,),
    "blk.0.attn_norm.weight": (8,),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8),
    "blk.0.attn_k.weight": (8, 4),
    "blk.0.attn_v.weight": (8, 4),
    "blk.0.attn_output.weight": (8, 8),
    "blk.0.ffn_gate.weight": (8, 16),
    "blk.0.ffn_up.weight": (8, 16),
    "blk.0.ffn_down.weight": (16, 8),
}


def write_gguf(
    values: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    *,
    kinds: Mapping[str, int] | None = None,
    rng: Random | None = None,
) -> bytes:
    """A file with these values and float32 tensors; `rng` spoils some offsets."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, item in values.items():
        parts += [_text(key), _value(item)]
    offset = 0
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        said = offset
        if rng and rng.random() < 0.05:
            said = rng.choice(_NUMBERS)
        kind = (kinds or {}).get(name, 0)
        axes = [n % 2**64 for n in shape]
        parts += [_text(name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes)]
        parts.append(struct.pack("<IQ", kind, said))
        offset += min(size, 2**12)
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(min(offset, 2**14))


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(item: Any) -> bytes:
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        wide = not 0 <= item < 2**32
        return struct.pack("<IQ" if wide else "<II", 10 if wide else 4, item % 2**64)
    if isinstance(item, float):
        return struct.pack("<Id", 12, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + _text(item)
    items = [_value(x) for x in item] if isinstance(item, list | tuple) else []
    kinds = {x[:4] for x in items}
    if len(kinds) != 1:  # none, or a mixture that the format cannot write
        return struct.pack("<IIQ", 9, 4, 0)
    return (
        struct.pack("<I", 9)
        + kinds.pop()
        + struct.pack("<Q", len(items))
        + b"".join(x[4:] for x in items)
    )


def make_gguf(rng: Random) -> bytes:
    whole = write_gguf(_MODEL, _TENSORS)
    if rng.random() < 0.5:
        return mutate(rng, whole, [whole])
    values, tensors = dict(_MODEL), dict(_TENSORS)
    for key in rng.sample(sorted(values), rng.randrange(4)):
        if rng.random() < 0.3:
            del values[key]
        elif isinstance(values[key], list) and rng.random() < 0.7:
            items = list(values[key])
            items[rng.randrange(len(items))] = rng.choice([*_TEXTS, *items, 3])
            values[key] = items[: rng.randrange(len(items) + 1)]
        else:
            values[key] = value(rng, 1)
    kinds = {}
    for name in rng.sample(sorted(tensors), rng.randrange(3)):
        what = rng.randrange(3)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[name] = tuple(rng.choice([8, *_NUMBERS]) for _ in tensors[name])
        else:
            kinds[name] = rng.randrange(40)
    return write_gguf(values, tensors, kinds=kinds, rng=rng)


def run_gguf(data: bytes, folder: Path) -> None:
    from jaxrl_post import models
    from jaxrl_post.generation import tokenize_prompts

    path = folder / "m.gguf"
    path.unlink(missing_ok=True)  # a memory map of the last one may still live
    path.write_bytes(data)
    _, _, tokenizer = models.load(path)
    if tokenizer is not None:
        tokenize_prompts(tokenizer, [[{"role": "user", "content": "ab a"}]])


# ---- configs ------------------------------------------------------------------------

_KEYS = "run model task recipe optimizer training sampling mesh evaluation stages "
_KEYS += "dir seed path name split steps group_size prompts_per_step temperature top_k "
_KEYS += "stop data fsdp rows samples greedy levels reward held max_new_tokens preset"


def make_config(rng: Random) -> tuple[bytes, list[str]]:
    import yaml

    texts = [path.read_bytes() for path in sorted(ROOT.glob("configs/*.yaml"))]
    keys = _KEYS.split()
    overrides = [
        ".".join(rng.choices(keys, k=rng.randrange(1, 4)))
        + rng.choice(("=", "=", ""))
        + rng.choice((str(value(rng)), rng.choice(_TEXTS)))
        for _ in range(rng.randrange(3))
    ]
    if rng.random() < 0.5:
        return mutate(rng, rng.choice(texts), texts), overrides
    tree = yaml.safe_load(rng.choice(texts))
    for _ in range(rng.randrange(4)):
        section = rng.choice([*tree, rng.choice(keys)])
        if isinstance(tree.get(section), dict) and rng.random() < 0.8:
            key = rng.choice([*tree[section], rng.choice(keys)])
            tree[section][key] = value(rng)
        else:
            tree[section] = value(rng)
    return json.dumps(tree).encode(), overrides


def run_config(data: tuple[bytes, list[str]], folder: Path) -> None:
    from jaxrl_post.training.config import Config, load_config

    text, overrides = data
    path = folder / "config.yaml"
    path.write_bytes(text)
    config = load_config(path, overrides)
    assert config.to_yaml()
    again = Config.from_dict(config.to_dict(), str(path))
    assert repr(again) == repr(config)


# ---- data sets ----------------------------------------------------------------------

_ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "solution": "1 + 1 = 2"},
    {"prompt": [{"role": "user", "content": "q"}], "answer": 7, "solution": None},
    {
        "data_source": "s",
        "prompt": [{"role": "user", "content": "q"}],
        "reward_model": {"style": "rule", "ground_truth": ["7"]},
    },
    {"question": "q", "answer": "so it is\n#### 7"},
]


def make_dataset(rng: Random) -> tuple[str, bytes, dict[str, Any]]:
    row = json.loads(json.dumps(rng.choice(_ROWS)))
    rows = [json.loads(json.dumps(row)) for _ in range(3)]
    for row in rows:
        for key in rng.sample(sorted(row), rng.randrange(2)):
            row[key] = value(rng)
    kind = rng.choice(("jsonl", "jsonl", "json", "parquet"))
    if kind == "json":
        data = json.dumps(rows).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        data = _parquet()
    if rng.random() < 0.6 or kind == "parquet":
        data = mutate(rng, data, [data])
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["demonstration"] = "solution"
    if rng.random() < 0.2:
        options["data_source"] = "s"
    if rng.random() < 0.2:
        options[rng.choice(("prompt", "answer", "system", "judge"))] = value(rng, 1)
    return kind, data, options


def _parquet(cache: list[bytes] = []) -> bytes:  # noqa: B006  (kept on purpose)
    if not cache:
        import io

        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        table = pyarrow.Table.from_pylist(_ROWS[1:2] * 5)
        pyarrow.parquet.write_table(table, buffer)
        cache.append(buffer.getvalue())
    return cache[0]


def run_dataset(data: tuple[str, bytes, dict[str, Any]], folder: Path) -> None:
    from jaxrl_post import tasks

    kind, content, options = data
    path = folder / f"rows.{kind}"
    path.write_bytes(content)
    is_gsm = b'"question"' in content
    for name, given in (
        ("rows", {"source": str(path), **options}),
        ("gsm8k", {"path": str(path)}),
    ):
        if name == "gsm8k" and not is_gsm:
            continue
        task = tasks.load(name, **given)
        prompts = task.prompts(0, 0, 7)
        for messages, solution in zip(
            prompts.messages, prompts.demonstrations, strict=True
        ):
            assert all(isinstance(m["content"], str) for m in messages)
            assert solution is None or isinstance(solution, str)


# ---- packed tests -------------------------------------------------------------------

_TESTS = '[{"input": "1 2", "output": "3", "testtype": "stdin"}]'


def make_tests(rng: Random) -> str:
    protocol = rng.randrange(pickle.HIGHEST_PROTOCOL + 1)
    made = value(rng) if rng.random() < 0.2 else _TESTS
    data = pickle.dumps(made, protocol)
    if rng.random() < 0.7:
        data = mutate(rng, data, [data])
    data = zlib.compress(data)
    if rng.random() < 0.3:
        data = mutate(rng, data, [data])
    return rng.choice((base64.b64encode, base64.b85encode))(data).decode()


def run_tests(data: str, folder: Path) -> None:
    from jaxrl_post.tasks import livecodebench

    assert isinstance(livecodebench.private_tests(data), list)


# ---- answers ------------------------------------------------------------------------

_PIECES = ["<answer>", "</answer>", "\\boxed{", "\\boxed {", "{", "}", "#### ", "\n"]
_PIECES += [
    "The answer is ",
    "answer:",
    "Answer = ",
    "**",
    "$",
    "€",
    ",",
    ".",
    "-",
    " ",
]
_PIECES += [
    "1,072",
    "3.5",
    "7",
    "1/2",
    "\\frac{1}{2}",
    "A",
    "B",
    "e",
    "10^5",
    "<<",
    ">>",
]
_PIECES += ["```", "\nAction: f", "\nAction Input: {", "\nAction Input: {}", '"']
_PIECES += ["%", " mol", "kg", "\\text{", "\t", "−", "٣", "𝟙", "\u2028", "\0", "\ud800"]


def make_answer(rng: Random) -> tuple[str, str]:
    pieces = rng.sample(_PIECES, rng.randrange(1, len(_PIECES)))
    texts = []
    for _ in range(2):
        count = rng.choice((1, 3, 10, 100, 100, 1000))
        texts.append("".join(rng.choices(pieces, k=count)))
        if rng.random() < 0.1:  # long runs of one piece: what is quadratic shows
            texts[-1] += rng.choice(pieces) * 5000
    return texts[0], texts[1]


def run_answer(data: tuple[str, str], folder: Path) -> None:
    from jaxrl_post import tasks
    from jaxrl_post.tasks import code, extraction, gsm8k, tooluse
    from jaxrl_post.tasks.rows import exact_match
    from jaxrl_post.tasks.sciknoweval import MultipleChoice
    from jaxrl_post.types import Prompts

    completion, answer = data
    extraction.last_boxed(completion)
    extraction.last_tagged(completion)
    extraction.final_answer(completion, accept=lambda text: False)
    code.program_in(completion)
    calls = json.dumps([{"Action": answer, "Action_Input": "{}"}])
    prompts = Prompts(("q",), ((),), ({"answer": calls},), (None,))
    for mode in tooluse.MODES:
        tooluse.ToolUse(mode)(prompts, [completion])
    prompts = Prompts(("q",), ((),), ({"answer": answer},), (None,))
    for judge in (
        gsm8k.judge,
        exact_match,
        MultipleChoice("tags"),
        MultipleChoice("boxed"),
    ):
        (verdict,) = judge(prompts, [completion])
        assert verdict.reward in (None, 0.0, 1.0)
    task = _SCIENCE.setdefault("task", tasks.load("science", size=1))
    questions = task.rows(range(len(task)))
    for verdict in task.judge(questions, [completion] * len(task)):
        assert verdict.reward is not None


_SCIENCE: dict[str, Any] = {}

TARGETS = {
    "gguf": Target(make_gguf, run_gguf),
    "config": Target(make_config, run_config),
    "dataset": Target(make_dataset, run_dataset),
    "tests": Target(make_tests, run_tests),
    "answers": Target(make_answer, run_answer),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzzes one target; 0 if nothing surprised, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="input number N alone")
    parser.add_argument("--log", type=Path, help="a JSONL file to add the record to")
    args = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", JAX_PLATFORMS="cpu")
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    print(f"the input under way lies in {folder}", file=sys.stderr)
    record = fuzz(
        args.target,
        TARGETS[args.target],
        folder,
        seed=args.seed,
        seconds=60 * args.minutes,
        only=args.only,
    )
    given = sys.argv[1:] if argv is None else argv
    record["command"] = shlex.join(["python", "scripts/fuzz.py", *given])
    print(json.dumps(record))
    if args.log:
        with args.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record["crashes"]


if __name__ == "__main__":
    sys.exit(main())
