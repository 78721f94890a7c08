"""Unit cells and blocks: how many atoms, how dense, how heavy."""

from __future__ import annotations

from random import Random

from jaxrl_post.tasks.science.question import Question, numeric, product

METALS = ("cobalt", "copper", "gold", "lead", "zinc", "tin", "silver", "nickel")
ATOMS = {"sc": 1, "bcc": 2, "fcc": 4}
# What one gets by counting every drawn atom whole, those at the corners included.
DRAWN = {"sc": 8, "bcc": 9, "fcc": 14}


def _cells(rng: Random) -> Question | None:
    metal, lattice, count = (
        rng.choice(METALS),
        rng.choice(list(ATOMS)),
        rng.randint(2, 9),
    )
    return numeric(
        "materials",
        1,
        "cells",
        lattice,
        f"a {metal} crystal has {count} {lattice} unit cells. atoms?",
        product(ATOMS[lattice], count),
        (
            product(DRAWN[lattice], count),
            f"{ATOMS[lattice]}+{count}={ATOMS[lattice] + count}",
        ),
        f"cells share corner atoms, {lattice} has {ATOMS[lattice]}",
    )


def _density(rng: Random) -> Question | None:
    metal, volume, density = rng.choice(METALS), rng.randint(2, 9), rng.randint(2, 9)
    mass = volume * density
    return numeric(
        "materials",
        1,
        "density",
        metal,
        f"a {metal} block of {volume} cm3 weighs {mass} g. density in g/cm3?",
        f"{mass}/{volume}={density}",
        (f"{mass}-{volume}={mass - volume}", f"{mass}+{volume}={mass + volume}"),
        f"density is mass over volume: {mass}/{volume}",
    )


def _two_crystals(rng: Random) -> Question | None:
    metal = rng.choice(METALS)
    (first, second), k, j = (
        rng.sample(list(ATOMS), 2),
        rng.randint(2, 9),
        rng.randint(2, 9),
    )

    def working(table: dict[str, int]) -> str:
        a, b = table[first] * k, table[second] * j
        return f"{table[first]}*{k}+{table[second]}*{j}={a}+{b}={a + b}"

    return numeric(
        "materials",
        2,
        "two crystals",
        first,
        f"a {metal} sample has {k} {first} and {j} {second} unit cells. atoms?",
        working(ATOMS),
        (working(DRAWN), f"{k}+{j}={k + j}"),
        f"cells share corner atoms: {ATOMS[first]}*{k}+{ATOMS[second]}*{j}",
    )


def _mass(rng: Random) -> Question | None:
    metal, volume, density = rng.choice(METALS), rng.randint(11, 49), rng.randint(2, 9)
    return numeric(
        "materials",
        2,
        "mass",
        metal,
        f"a {metal} block of {volume} cm3 has density {density} g/cm3. mass in g?",
        product(volume, density),
        (
            f"{volume}+{density}={volume + density}",
            f"{volume}-{density}={volume - density}",
        ),
        f"mass is volume times density: {volume}*{density}",
    )


def _vacancies(rng: Random) -> Question | None:
    metal, lattice = rng.choice(METALS), rng.choice(("bcc", "fcc"))
    count, gaps = rng.randint(3, 9), rng.randint(2, 9)

    def working(table: dict[str, int], sign: int = -1) -> str:
        full = table[lattice] * count
        mark = "-" if sign < 0 else "+"
        return (
            f"{product(table[lattice], count)} {full}{mark}{gaps}={full + sign * gaps}"
        )

    if ATOMS[lattice] * count <= gaps:
        return None
    return numeric(
        "materials",
        3,
        "vacancies",
        lattice,
        f"a {metal} crystal of {count} {lattice} unit cells has {gaps} vacancies. "
        "atoms?",
        working(ATOMS),
        (working(ATOMS, +1), f"{ATOMS[lattice]}*{count}={ATOMS[lattice] * count}"),
        f"a vacancy is a missing atom: {ATOMS[lattice]}*{count}-{gaps}",
    )


def _plate(rng: Random) -> Question | None:
    metal = rng.choice(METALS)
    a, b, density = rng.randint(2, 7), rng.randint(2, 7), rng.randint(2, 9)
    if a * b < 10:
        return None
    return numeric(
        "materials",
        4,
        "plate",
        metal,
        f"a {metal} plate of {a} by {b} by 1 cm has density {density}. mass in g?",
        f"{product(a, b)} {product(a * b, density)}",
        (f"{a}+{b}={a + b} {product(a + b, density)}", product(a, b)),
        f"multiply the sides, then by density: {a}*{b}",
    )


def _wire(rng: Random) -> Question | None:
    metal, length, weight = (
        rng.choice(METALS),
        rng.randint(201, 899),
        rng.randint(21, 89),
    )
    tens = weight // 10 * 10
    return numeric(
        "materials",
        5,
        "wire",
        metal,
        f"a {metal} wire of {length} m weighs {weight} g per m. mass in g?",
        f"{length * tens}+{length * (weight - tens)}={length * weight}",
        (
            f"{length}+{weight}={length + weight}",
            f"{length}-{weight}={length - weight}",
        ),
        f"mass is length times weight per m: {length}*{weight}",
    )


MAKERS = {
    1: (_cells, _density),
    2: (_two_crystals, _mass),
    3: (_vacancies,),
    4: (_plate,),
    5: (_wire,),
}
