"""Finding things by name: ``module:function``, and the nearest name to a typo."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that helps with an unknown name.

    >>> nearest("gms8k", ["gsm8k", "math"])
    'Did you mean gsm8k? There are: gsm8k, math.'
    >>> nearest("xyz", ["gsm8k", "math"])
    'There are: gsm8k, math.'
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}There are: {', '.join(known)}."


def resolve(path: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
      ValueError: there is no such module or function, or it cannot be called. An
        error inside the module itself is passed on as it is.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{path!r} is not of the form 'module:function'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            raise
        raise ValueError(
            f"No module {missing!r} (for {path!r}). Its folder must be on PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(
            f"Module {module_name!r} has no function {attribute!r}. "
            + nearest(attribute, (n for n in public if callable(getattr(module, n))))
        )
    return function
