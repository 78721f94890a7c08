"""Formulas: counting atoms and adding up molar masses."""

from __future__ import annotations

from random import Random

from jaxrl_post.tasks.science.question import Question, numeric, product

MASS = {"H": 1, "C": 12, "N": 14, "O": 16, "F": 19, "Na": 23, "Mg": 24, "S": 32}

Parts = list[tuple[str, int]]


def _parts(rng: Random, count: int, most: int) -> Parts:
    """`count` different elements, each with a subscript; at least one above 1."""
    subscripts = [rng.choice((1, *range(1, most + 1))) for _ in range(count)]
    if max(subscripts) == 1:
        subscripts[rng.randrange(count)] = rng.randint(2, most)
    return list(zip(rng.sample(list(MASS), count), subscripts, strict=True))


def _formula(parts: Parts) -> str:
    return "".join(element + (str(n) if n > 1 else "") for element, n in parts)


def _sum(numbers: list[int]) -> str:
    return "+".join(map(str, numbers)) + f"={sum(numbers)}"


def _running_sum(numbers: list[int]) -> str:
    """``46+32=78 78+64=142``: one addition at a time."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return " ".join(steps)


def _atoms(rng: Random) -> Question | None:
    parts = _parts(rng, rng.choice((2, 3)), 5)
    return numeric(
        "chemistry",
        1,
        "atoms",
        parts[0][0],
        f"how many atoms are in {_formula(parts)}?",
        _sum([n for _, n in parts]),
        (_sum([1] * len(parts)),),
        f"add the subscripts: {'+'.join(str(n) for _, n in parts)}",
    )


def _molecules(rng: Random) -> Question | None:
    parts, count = _parts(rng, 2, 5), rng.randint(2, 9)
    element, n = rng.choice([part for part in parts if part[1] > 1])
    return numeric(
        "chemistry",
        1,
        "molecules",
        element,
        f"how many {element} atoms are in {count} molecules of {_formula(parts)}?",
        product(count, n),
        (f"{count}+{n}={count + n}",),
        f"each molecule has {n} of them: {count}*{n}",
    )


def _molar_mass(rng: Random) -> Question | None:
    parts = _parts(rng, 2, 4)
    return numeric(
        "chemistry",
        2,
        "molar mass",
        parts[0][0],
        f"molar mass of {_formula(parts)}?",
        _running_sum([MASS[element] * n for element, n in parts]),
        (
            _running_sum([MASS[element] for element, _ in parts]),
            _running_sum([n for _, n in parts]),
        ),
        "multiply each mass by its subscript: "
        + "+".join(f"{MASS[element]}*{n}" for element, n in parts),
    )


def _all_atoms(rng: Random) -> Question | None:
    parts, count = _parts(rng, 2, 5), rng.randint(2, 9)
    total = sum(n for _, n in parts)
    return numeric(
        "chemistry",
        2,
        "all atoms",
        parts[0][0],
        f"how many atoms are in {count} molecules of {_formula(parts)}?",
        f"{_sum([n for _, n in parts])} {product(total, count)}",
        (
            f"{_sum([n for _, n in parts])} {total}+{count}={total + count}",
            f"{_sum([1] * 2)} {product(2, count)}",
        ),
        f"count one molecule, then multiply by {count}",
    )


def _groups(rng: Random) -> Question | None:
    head, k = rng.choice(("Mg", "Na", "S")), rng.randint(1, 3)
    (a, n), (b, m) = zip(
        rng.sample(("H", "C", "N", "O", "F"), 2),
        (rng.randint(1, 2), rng.randint(1, 4)),
        strict=True,
    )
    times = rng.randint(2, 4)
    group = _formula([(a, n), (b, m)])
    return numeric(
        "chemistry",
        3,
        "groups",
        head,
        f"how many atoms are in {_formula([(head, k)])}({group}){times}?",
        f"{n}+{m}={n + m} {n + m}*{times}={(n + m) * times} "
        f"{k}+{(n + m) * times}={k + (n + m) * times}",
        (_sum([k, n, m]), _sum([k, n, m * times])),
        f"the group comes {times} times: {n}+{m}",
    )


def _long_molar_mass(rng: Random) -> Question | None:
    parts = _parts(rng, 3, 4)
    return numeric(
        "chemistry",
        4,
        "long molar mass",
        parts[0][0],
        f"molar mass of {_formula(parts)}?",
        _running_sum([MASS[element] * n for element, n in parts]),
        (
            _running_sum([MASS[element] for element, _ in parts]),
            _running_sum([n for _, n in parts]),
        ),
        "multiply each mass by its subscript: "
        + "+".join(f"{MASS[element]}*{n}" for element, n in parts),
    )


def _moles(rng: Random) -> Question | None:
    parts, moles = _parts(rng, 3, 4), rng.randint(21, 89)
    molar = sum(MASS[element] * n for element, n in parts)
    return numeric(
        "chemistry",
        5,
        "moles",
        parts[0][0],
        f"mass in g of {moles} mol of {_formula(parts)}?",
        f"{molar}*{moles}={molar * moles}",
        (_running_sum([MASS[element] for element, _ in parts]),),
        f"multiply the molar mass by {moles}",
    )


MAKERS = {
    1: (_atoms, _molecules),
    2: (_molar_mass, _all_atoms),
    3: (_groups,),
    4: (_long_molar_mass,),
    5: (_moles,),
}
