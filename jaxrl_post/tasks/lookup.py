"""Finding a user's own function by name."""

from __future__ import annotations

import importlib
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_post.errors import InputError, nearest, one_line, shown


def check_types(
    function: Callable[..., Any], arguments: Mapping[str, Any], section: str
) -> None:
    """Holds what a config gives a function against the types that it declares.

    Types that no config can write, such as a function, are not looked at.

    Raises:
      InputError: a value of another type, named as ``section.argument``.

    >>> def load(size: int | None = None): ...
    >>> check_types(load, {"size": "many"}, "task")
    Traceback (most recent call last):
    jaxrl_post.errors.InputError: task.size='many': expected int or None.
    """
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # names that only a type checker imports
        return
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            words = _in_words(hints[name])
            raise InputError(f"{section}.{name}={shown(value)}: expected {words}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    kind = origin or hint
    if kind in (int, float):
        # numpy's too, which composers hand over
        number = numbers.Real if kind is float else numbers.Integral
        return isinstance(value, number) and not isinstance(value, bool)
    if kind in (Sequence, list, tuple) and parts:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(_fits(item, parts[0]) for item in value)
    if kind in (str, bool, types.NoneType, Mapping, dict):
        return isinstance(value, kind)
    return True


def _in_words(hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, parts))
    if typing.get_origin(hint) is Sequence:
        return f"a list of {_in_words(parts[0])}"
    return "None" if hint is types.NoneType else getattr(hint, "__name__", str(hint))


def is_own(name: object) -> bool:
    """Whether a config's name is that of a user's function, ``module:function``.

    >>> is_own("my.module:make"), is_own("adamw"), is_own("./odd:folder")
    (True, False, False)
    """
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.]*:\w+", name))


def call_own(
    path: str,
    given: Mapping[str, Any],
    offered: Mapping[str, Any],
    *,
    section: str,
    key: str = "name",
) -> Any:
    """What a user's function returns to a config.

    Args:
      path: ``module:function``.
      given: arguments that the config has for it.
      offered: further ones, which it gets where it names them.
      section: of the config, for messages.
      key: in that section, of the path.

    Raises:
      InputError: there is no such function, it has no such argument or lacks one, or it
        refuses one with a TypeError or a ValueError.

    >>> call_own("math:hypot", {}, {}, section="optimizer")
    0.0
    """
    try:
        function = resolve(path)
    except InputError as error:
        raise InputError(f"{section}.{key}: {error}") from error
    try:
        known = inspect.signature(function).parameters
    except ValueError:  # of a builtin
        return function(**given)
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in given:
        if name not in known and not free:
            raise InputError(
                f"{section}.{name}: {path!r} has no such argument; "
                f"{nearest(name, known)}"
            )
    check_types(function, given, section)
    arguments = {**{k: v for k, v in offered.items() if k in known}, **given}
    for name, parameter in known.items():
        named = parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if named and parameter.default is parameter.empty and name not in arguments:
            raise InputError(f"{section}.{name}: missing; {path!r} needs it.")
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{section}.{key}={path!r}: {one_line(error)}") from error


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
