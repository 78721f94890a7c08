"""Finding a user's own function by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from jaxrl_post.errors import InputError, nearest


def resolve(path: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
      InputError: there is no such module or function, or it cannot be called. An
        error inside the module itself is passed on as it is.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{path!r} is not of the form 'module:function'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            raise
        raise InputError(
            f"No module {missing!r} (for {path!r}). Its folder must be the current one "
            "or on PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise InputError(
            f"Module {module_name!r} has no function {attribute!r}; "
            + nearest(attribute, (n for n in public if callable(getattr(module, n))))
        )
    return function
