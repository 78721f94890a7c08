"""From YAML text to frozen dataclasses, with every problem named at once.

`config.py` says what a config holds; this module knows how any such schema is read.
A field is declared with its type and, by `number`, its bounds; a field
made by `rest` takes the keys of its section that no other field claims.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml

from jaxrl_post.errors import ConfigError, nearest, one_line, shown
from jaxrl_post.tasks.lookup import is_own

T = TypeVar("T")


def number(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    built_in: bool = False,
) -> Any:
    """A dataclass field that holds a finite number within bounds (or None, if typed
    so).

    Args:
      built_in: what the section names has it where that is the package's; a function
        of the user's has arguments of its own, see `rest`.
    """
    bounds = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    kept = {k: v for k, v in bounds.items() if v is not None}
    metadata = {"bounds": kept, "built_in": built_in}
    return dataclasses.field(default=default, metadata=metadata)


def inherited(**bounds: Any) -> Any:
    """A dataclass field that is filled in from elsewhere when it is not given."""
    return number(None, **bounds)


def rest(own: str | None = None) -> Any:
    """A dataclass field that collects the keys of its section that have no field.

    Args:
      own: a field of the section; only where it names a function of the user's
        (``module:function``) are there such keys. Fields that are `built_in` are then
        among them.
    """
    metadata = {"rest": True, "own": own}
    return dataclasses.field(default_factory=dict, metadata=metadata)


_MOST_VALUES = 100_000
"""Of one file, those that aliases repeat counted each time."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number, and a key given twice an error."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _expanded_size(node, {})
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.MarkedYAMLError(
                problem="the integer has more than 64 bits",
                problem_mark=node.start_mark,
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is not text; quote it",
                    problem_mark=key_node.start_mark,
                )
            if not key.isprintable():
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} has characters that cannot be shown",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is given twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node, and itself, as if aliases were copies.

    A few lines of aliases of aliases mean more values than memory holds.

    Raises:
      yaml.MarkedYAMLError: too many, or a value that contains itself.
    """
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_VALUES  # what an alias inside the node itself meets
        children: Sequence[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    if sizes[id(node)] > _MOST_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"aliases make more than {_MOST_VALUES} values of it",
            problem_mark=node.start_mark,
        )
    return sizes[id(node)]


# YAML 1.1 wants a dot in a float, so that a learning rate of 1e-6 would be text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` writes in YAML.

    >>> parse_yaml("{learning_rate: 1e-6, stop: [a, b]}", "example")
    {'learning_rate': 1e-06, 'stop': ['a', 'b']}

    Raises:
      ConfigError: for text that is not YAML, and for a key given twice.
    """
    try:
        # The loader is a SafeLoader: plain data, no objects.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(source, [f"{where}{error.problem or error}"]) from None
    except Exception as error:  # PyYAML lets several other types through
        raise ConfigError(
            source, [f"not readable as YAML: {one_line(error)}"]
        ) from None


def override(tree: dict[str, Any], assignment: str) -> None:
    """Carries out ``section.key=value`` on `tree`; the value is read as YAML.

    Names may themselves contain dots: at each level the longest name that exists wins.

    >>> tree = {"evaluation": {"t0.6": {"rows": 8}}}
    >>> override(tree, "evaluation.t0.6.rows=16")
    >>> tree
    {'evaluation': {'t0.6': {'rows': 16}}}
    """
    source = f"override {assignment!r}"
    path, equals, text = assignment.partition("=")
    if not equals or not path.isprintable() or not path:
        raise ConfigError(source, ["write overrides as section.key=value"])
    value = parse_yaml(text, source)
    node: Any = tree
    names = path.split(".")
    while names:
        if not isinstance(node, dict):
            raise ConfigError(source, [f"there is no section to hold {names[0]!r}"])
        prefixes = (".".join(names[:n]) for n in range(len(names), 0, -1))
        name = next((prefix for prefix in prefixes if prefix in node), names[0])
        names = names[name.count(".") + 1 :]
        if not names:
            node[name] = value
        elif node.get(name) is None:
            node[name] = {}
        node = node[name]


def build(schema: type[T], tree: Any, source: str) -> T:
    """An instance of the dataclass `schema` from plain data.

    Raises:
      ConfigError: naming every unknown key, missing key and unfit value in `tree`.
    """
    problems: list[str] = []
    known = tuple(_dotted_names(schema))
    result = _build(schema, tree, "", known, problems)
    if problems:
        raise ConfigError(source, problems)
    return typing.cast(T, result)


def plain(value: Any) -> Any:
    """The data that `build` would make `value` from: dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree: dict[str, Any] = {}
        for field in _fields_read(type(value), vars(value)):
            item = plain(getattr(value, field.name))
            tree |= item if field.metadata.get("rest") else {field.name: item}
        return tree
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _build(
    schema: Any, tree: Any, path: str, known: Sequence[str], problems: list[str]
) -> Any:
    if not isinstance(tree, Mapping):
        problems.append(f"{path or 'the file'}={tree!r}: expected a section of keys")
        return None
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    fields = _fields_read(schema, tree)
    named = {field.name for field in fields if not field.metadata.get("rest")}
    free = {key: value for key, value in tree.items() if key not in named}
    for field in fields:
        here = f"{path}.{field.name}" if path else field.name
        if field.metadata.get("rest"):
            values[field.name], free = free, {}
        elif field.name in tree:
            value = _convert(hints[field.name], tree[field.name], here, known, problems)
            values[field.name] = value
            if problem := _out_of_bounds(value, field.metadata.get("bounds", {})):
                problems.append(f"{here}={shown(value)}: {problem}")
        elif _required(field):
            problems.append(f"{here}: missing")
    for key, value in free.items():
        here = f"{path}.{key}" if path else key
        hint = _nearest_path(here, known)
        problems.append(f"{here}={shown(value)}: no such key; {hint}")
    complete = all(f.name in values for f in dataclasses.fields(schema) if _required(f))
    return schema(**values) if complete else None


def _fields_read(schema: Any, tree: Mapping[str, Any]) -> list[dataclasses.Field[Any]]:
    """The fields of a section, by whether it names a function of the user's."""
    fields = list(dataclasses.fields(schema))
    owner = next((n for f in fields if (n := f.metadata.get("own"))), None)
    if owner is None:
        return fields
    kind = "built_in" if is_own(tree.get(owner)) else "rest"
    return [field for field in fields if not field.metadata.get(kind)]


def _convert(
    hint: Any, value: Any, path: str, known: Sequence[str], problems: list[str]
) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(arguments[0], value, path, known, problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, known, problems)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(
            _convert(arguments[0], item, f"{path}.{i}", known, problems)
            for i, item in enumerate(value)
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {
                key: _convert(arguments[1], item, f"{path}.{key}", known, problems)
                for key, item in value.items()
            }
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    problem = f"expected {_in_words(hint)}"
    if origin is Literal and isinstance(value, str):
        problem += f"; {nearest(value, arguments)}"
    problems.append(f"{path}={shown(value)}: {problem}")
    return None


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list, each item {_in_words(arguments[0])}"
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        Any: "a value",
    }
    return words.get(hint, "a section of keys")


def _out_of_bounds(value: Any, bounds: Mapping[str, float]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    fits = {
        "above": lambda bound: value > bound,
        "at least": lambda bound: value >= bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    if not math.isfinite(value):
        return "must be a finite number"
    if all(fits[word](bound) for word, bound in bounds.items()):
        return None
    return "must be " + " and ".join(f"{word} {b:g}" for word, b in bounds.items())


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _dotted_names(schema: Any, path: str = "") -> Iterator[str]:
    """The names of all keys below `schema`: sections, then ``section.key``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if not field.metadata.get("rest"):
            yield path + field.name
            hint = hints[field.name]
            section = next(iter(typing.get_args(hint)), hint)  # of `Section | None`
            if dataclasses.is_dataclass(section):
                yield from _dotted_names(section, f"{path}{field.name}.")


def _nearest_path(path: str, known: Sequence[str]) -> str:
    """What an unknown key most likely was: the same key of another section, or the
    nearest one of its own."""
    section, _, key = path.rpartition(".")
    if moved := [name for name in known if name.rpartition(".")[2] == key]:
        return f"did you mean {' or '.join(map(repr, moved))}?"
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    return nearest(path, siblings or known)


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested keys, by their whole names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flat_keys(value, f"{name}.")
        else:
            flat[name] = value
    return flat
