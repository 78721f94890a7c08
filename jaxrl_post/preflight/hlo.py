"""What a compiled program's text tells: its collectives, and the shapes in it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_BITS = {"pred": 8, "bf16": 16, "f8": 8, "f16": 16, "f32": 32, "f64": 64}
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r"known_trip_count\D*?(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(\S.*?, %?([\w.\-]+)\), direction=LT")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives of a program by kind: how often, and bytes of their results.

    Bytes are one device's. A loop counts as often as the compiler says that it runs, or
    else as the constant says that its condition compares with, where there is one (all
    that TPU's compiler writes); others once.

    >>> collectives('''ENTRY %main (a: f32[8]) -> f32[32] {
    ...   %a = f32[8]{0} parameter(0)
    ...   ROOT %g = f32[32]{0} all-gather(%a), dimensions={0}
    ... }''')
    {'all-gather': {'count': 1, 'bytes': 128}}
    """
    own: dict[str, list[tuple[str, int]]] = defaultdict(list)
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    loops: dict[str, list[tuple[str, str]]] = defaultdict(list)
    constants: dict[tuple[str, str], int] = {}
    bounds: dict[str, int] = {}
    entry = here = ""
    for line in text.splitlines():
        if line.endswith("{") and (head := _HEAD.match(line)):
            here = head[2] or head[4]
            if head[1] or head[3]:
                entry = here
            continue
        if "=" not in line:
            continue
        if found := _COLLECTIVE.search(line):
            size = _result_bytes(found[1], found[2], bool(found[3]))
            own[here].append((found[2], size))
        if found := _CONSTANT.search(line):
            constants[here, found[1]] = int(found[2])
        if found := _BELOW.search(line):
            bounds[here] = constants.get((here, found[1]), 1)
        condition = _CONDITION.search(line) if " while(" in line else None
        told = _TRIPS.search(line)
        for called in _CALLED.findall(line):
            for name in re.findall(r"[\w.\-]+", called):
                if condition is None:
                    calls[here].append((name, 1))
                elif told:
                    calls[here].append((name, int(told[1])))
                else:
                    loops[here].append((name, condition[1]))

    totals: dict[str, dict[str, int]] = {}
    seen: dict[str, Mapping[tuple[str, int], int]] = {}

    def visit(name: str) -> Mapping[tuple[str, int], int]:
        if name not in seen:
            sums: dict[tuple[str, int], int] = defaultdict(int)
            for kind, size in own[name]:
                sums[kind, size] += 1
            counted = [(body, bounds.get(test, 1)) for body, test in loops[name]]
            for called, times in [*calls[name], *counted]:
                for key, count in visit(called).items():
                    sums[key] += times * count
            seen[name] = sums
        return seen[name]

    for (kind, size), count in sorted(visit(entry).items()):
        row = totals.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += count
        row["bytes"] += count * size
    return totals


def widest_logits(text: str, vocabulary: set[int], width: set[int]) -> int:
    """The most tokens that any array with a dimension of the vocabulary has.

    Collectives' arrays are among them. Of two dimensions, a vocabulary and a width, it
    is the unembedding or its gradient, whole or a part.

    Args:
      text: of the compiled program.
      vocabulary: sizes of that dimension, whole and as split.
      width: the model's, whole and as split: the unembedding's own other dimension.

    >>> widest_logits("f32[2,96,64]{2,1,0} f32[64,32]", {64}, {32})
    192
    """
    most = 0
    for _, shape in set(_SHAPE.findall(text)):
        dims = [int(x) for x in shape.split(",") if x]
        for size in vocabulary.intersection(dims):
            others = list(dims)
            others.remove(size)
            if not (len(dims) == 2 and width.issuperset(others)):
                most = max(most, math.prod(others))
    return most


def _result_bytes(result: str, kind: str, started: bool) -> int:
    """Bytes of a collective's result; that of a started one has its operands first."""
    sizes = []
    for dtype, shape in _SHAPE.findall(result):
        if started and dtype == "u32" and not shape:
            continue  # the handle of a permutation under way
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        sizes.append(math.prod(int(x) for x in shape.split(",") if x) * bits // 8)
    if started and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)
