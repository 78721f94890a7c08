"""LiveCodeBench's layout of problems (arXiv 2403.07974).

Its private tests are a text: base64 of zlib of a pickle of a JSON text. A pickle can
run code and take any amount of memory, so that none is loaded here: the few
instructions that make a text are looked for, and anything else is refused.
"""

from __future__ import annotations

import base64
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from jaxrl_post.errors import InputError, one_line, shown
from jaxrl_post.tasks.jsonvalues import parsed
from jaxrl_post.tasks.sources import column, text

MOST = 2**28
"""Bytes that the private tests of a problem may become."""

_TEXT = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_NOTHING = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")


def problem(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the code task wants it.

    Returns:
      ``id``, ``prompt``, ``starter_code``, ``function`` (None: a program that reads
      standard input) and ``tests``: the private ones, each with ``input`` (a text, or
      a list of arguments) and ``output`` (a text, or a value).

    Raises:
      InputError: something that is not in that layout.
    """
    name = str(column(record, "question_id"))
    where = f"question {name!r}"
    metadata = _json(text(record, "metadata"), where)
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    tests = private_tests(text(record, "private_test_cases"), where)
    return {
        "id": name,
        "prompt": text(record, "question_content"),
        "starter_code": record.get("starter_code") or "",
        "function": function,
        "tests": [_test(test, function, where) for test in tests],
    }


def private_tests(encoded: str, where: str = "a problem") -> list[Any]:
    """The list that a column of private tests holds: packed, or JSON as it is.

    >>> private_tests('[{"input": "1", "output": "2", "testtype": "stdin"}]')
    [{'input': '1', 'output': '2', 'testtype': 'stdin'}]
    """
    if encoded.lstrip()[:1] != "[":
        try:
            packed = base64.b64decode(encoded, validate=True)
            inflater = zlib.decompressobj()
            pickled = inflater.decompress(packed, MOST)
            if inflater.unconsumed_tail:
                raise ValueError(f"more than {MOST} bytes")
            encoded = _pickled_text(pickled)
        except (ValueError, zlib.error) as error:
            raise InputError(
                f"The private tests of {where} cannot be read: {one_line(error)}"
            ) from None
    tests = _json(encoded, where)
    if not isinstance(tests, list):
        raise InputError(f"The tests of {where} are no list: {shown(tests)}")
    return tests


def _pickled_text(pickled: bytes) -> str:
    """The text that a pickle holds, if that is all.

    >>> import pickle
    >>> _pickled_text(pickle.dumps("[1]"))
    '[1]'
    >>> _pickled_text(pickle.dumps(print))
    Traceback (most recent call last):
    ValueError: the pickle holds more than a text (STACK_GLOBAL)
    """
    found = []
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in _TEXT:
            found.append(argument)
        elif code.name == "STOP" and len(found) == 1:
            return str(found[0])
        elif code.name not in _NOTHING:
            raise ValueError(f"the pickle holds more than a text ({code.name})")
    raise ValueError("the pickle holds no text")


def _json(encoded: str, where: str) -> Any:
    try:
        return parsed(encoded)
    except ValueError as error:
        raise InputError(f"Of {where}: no JSON ({one_line(error)})") from None


def _test(test: Any, function: str | None, where: str) -> dict[str, Any]:
    if not isinstance(test, dict) or not all(
        isinstance(test.get(key), str) for key in ("input", "output")
    ):
        raise InputError(f"A test of {where} has no input and output: {shown(test)}")
    if (test.get("testtype") == "functional") != (function is not None):
        raise InputError(f"A test of {where} is not of the problem's kind.")
    given, expected = test["input"], test["output"]
    if function is None:
        return {"input": given, "output": expected}
    lines = [line for line in given.split("\n") if line.strip()]
    arguments = [_json(line, where) for line in lines]
    return {"input": arguments, "output": _json(expected, where)}
