"""Questions from any table: JSONL, parquet, or a data set on the Hub."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxrl_post.errors import InputError, nearest, shown
from jaxrl_post.tasks.base import Row, RowsTask, Task, nobody
from jaxrl_post.tasks.extraction import final_answer
from jaxrl_post.tasks.lookup import resolve
from jaxrl_post.tasks.sources import column, read, stream
from jaxrl_post.tasks.streams import StreamTask
from jaxrl_post.types import Judge, Message, Prompts, Verdict

JUDGES = ("exact", "gsm8k", "math", "mcq")
"""Judges that have a name; any other is named ``module:function``."""


def load(
    split: str = "train",
    *,
    source: str,
    subset: str | None = None,
    prompt: str = "prompt",
    answer: str | None = "answer",
    demonstration: str | None = None,
    judge: str | None = None,
    system: str | None = None,
    instruction: str | None = None,
    data_source: str | Sequence[str] | None = None,
    streaming: bool = False,
) -> Task:
    """Opens a table whose columns you name.

    Rows in verl's layout (``prompt`` messages, ``reward_model.ground_truth``) are
    recognised; `answer` is then not looked at. Repeated rows, with equal
    ``data_source`` and prompt, become one: benchmarks repeat rows to average over
    samples, which the evaluation's own ``k`` is for. The column ``repeats`` says how
    many there were.

    Args:
      split: of a folder or data set; a single file is taken whole.
      source: a ``.jsonl``, ``.json`` or ``.parquet`` file, a folder with one such file
        per split, or a Hub id.
      subset: configuration of the Hub's data set.
      prompt: column of the question: a text, or a list of messages.
      answer: column of the answer; None: there is none, and what completions are worth
        is for a reward function (see `tasks.load`) or a judge of your own to say.
      demonstration: column of a worked solution: a text, or what the assistant says in
        a list of messages, or in the first of several such lists; None: there is none.
      judge: one of `JUDGES`, or ``module:function`` (a `Judge`). By default ``"math"``
        for verl's layout, else ``"exact"``.
      system: system prompt, put before prompts that have none of their own.
      instruction: stands below every question that is a text.
      data_source: keep only rows whose column ``data_source`` is this, or one of these.
      streaming: hold only a part of the table at a time (`StreamTask`). Repeated rows
        stay as they are, and the first row says whether the layout is verl's.

    Returns:
      A task whose rows keep all other columns of the table.
    """
    name = Path(source).stem

    def make_row(i: int, record: Mapping[str, Any]) -> Row:
        columns = {k: v for k, v in record.items() if k != prompt}
        if _is_verl(record):
            columns["answer"] = _ground_truth(record)
        elif answer is not None:
            columns["answer"] = column(record, answer)
        return Row(
            id=f"{record.get('data_source', name)}/{i}",
            messages=_messages(column(record, prompt), system, instruction),
            columns=columns,
            demonstration=(
                _solution(column(record, demonstration)) if demonstration else None
            ),
        )

    if streaming:
        open_records = stream(source, split, subset=subset)

        def rows_of_stream() -> Iterator[Row]:
            records: Iterable[dict[str, Any]] = open_records()
            if data_source is not None:
                wanted = {data_source} if isinstance(data_source, str) else data_source
                records = (r for r in records if column(r, "data_source") in wanted)
            return itertools.starmap(make_row, enumerate(records))

        if (first := next(rows_of_stream(), None)) is None:
            raise InputError(f"{source} has no rows; check its split and filters.")
        judged_by = _judge(judge, answer, verl=_is_verl(first.columns))
        return StreamTask(name, rows_of_stream, judged_by)

    records = read(source, split, subset=subset)
    if data_source is not None:
        records = _of_source(records, data_source)
    found: dict[str, Row] = {}
    repeats: Counter[str] = Counter()
    for i, record in enumerate(records):
        row = make_row(i, record)
        key = json.dumps([row.id.removesuffix(f"/{i}"), row.messages])
        repeats[key] += 1
        found.setdefault(key, row)
    rows = [
        replace(row, columns={**row.columns, "repeats": repeats[key]})
        for key, row in found.items()
    ]
    verl = any(_is_verl(record) for record in records)
    return RowsTask(name, rows, _judge(judge, answer, verl=verl))


def _judge(name: str | None, answer: str | None, *, verl: bool) -> Judge:
    if name is not None:
        return named_judge(name)
    if answer is None and not verl:
        return nobody
    return named_judge("math" if verl else "exact")


def named_judge(name: str) -> Judge:
    """The judge with this name: one of `JUDGES`, or ``module:function``."""
    if ":" in name:
        return resolve(name)
    if name == "exact":
        return exact_match
    if name == "gsm8k":
        from jaxrl_post.tasks import gsm8k

        return gsm8k.judge
    if name == "math":
        from jaxrl_post.tasks.math import MathJudge

        return MathJudge()
    if name == "mcq":
        from jaxrl_post.tasks.sciknoweval import MultipleChoice

        return MultipleChoice(letters="ABCDEFGHIJ")
    raise InputError(
        f"Unknown judge {name!r}; {nearest(name, JUDGES)} "
        "(A judge of your own is named 'module:function'.)"
    )


def exact_match(prompts: Prompts, completions: Sequence[str]) -> list[Verdict]:
    """Reward 1 where the final answer is the row's ``answer``, else 0.

    The final answer is the last that is marked as one (`extraction.final_answer`), or
    the whole completion without a mark. Blanks at the ends don't count, runs of blanks
    count as one, case matters.

    >>> prompts = Prompts(("q",), ((),), ({"answer": "Paris"},), (None,))
    >>> exact_match(prompts, ["I think: <answer> Paris </answer>"])[0].reward
    1.0
    """
    verdicts = []
    for row, completion in zip(prompts.columns, completions, strict=True):
        marked = final_answer(completion)
        found = " ".join((completion if marked is None else marked).split())
        right = found == " ".join(str(row["answer"]).split())
        extra = {"parsed": marked is not None, "answer": found}
        verdicts.append(Verdict(float(right), right, None, extra))
    return verdicts


def _of_source(
    records: Sequence[dict[str, Any]], wanted: str | Sequence[str]
) -> list[dict[str, Any]]:
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    present = {str(column(record, "data_source")) for record in records}
    for name in names - present:
        raise InputError(f"No row has data_source {name!r}; {nearest(name, present)}")
    return [record for record in records if str(record["data_source"]) in names]


def _messages(
    prompt: Any, system: str | None, instruction: str | None
) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        content = f"{prompt}\n\n{instruction}" if instruction else prompt
        messages = [{"role": "user", "content": content}]
    elif isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
    else:
        raise InputError(
            "A prompt must be a text or a list of messages, each with a role and a "
            f"content, got {shown(prompt)}."
        )
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return tuple(messages)


def _solution(value: Any) -> str | None:
    """A worked solution's text; None where the row has none."""
    if value is None or isinstance(value, str):
        return value
    messages = value
    while isinstance(messages, list) and messages and isinstance(messages[0], list):
        messages = messages[0]
    if messages == []:
        return None
    if isinstance(messages, list) and all(isinstance(m, Mapping) for m in messages):
        said = [m.get("content") for m in messages if m.get("role") == "assistant"]
        if len(said) == 1 and isinstance(said[0], str):
            return said[0]
    raise InputError(
        "A demonstration must be a text or messages with one of the assistant's, got "
        f"{shown(value)}."
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _is_verl(record: Mapping[str, Any]) -> bool:
    model = record.get("reward_model")
    return isinstance(model, Mapping) and "ground_truth" in model


def _ground_truth(record: Mapping[str, Any]) -> Any:
    truth = record["reward_model"]["ground_truth"]
    single = isinstance(truth, list) and len(truth) == 1
    return truth[0] if single else truth
