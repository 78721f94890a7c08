"""Mechanics: products, with more steps or more digits as the level rises."""

from __future__ import annotations

from random import Random

from jaxrl_post.tasks.science.question import Question, numeric, product

OBJECTS = ("cart", "ball", "car", "rock", "sled", "box", "boat", "bike")


def _operands(rng: Random, level: int) -> tuple[int, int]:
    return rng.randint(2, 9) if level == 1 else rng.randint(11, 49), rng.randint(2, 9)


def _two_factors(
    rng: Random, level: int, kind: str, text: str, rule: str
) -> Question | None:
    """`text` with ``{a}``, ``{b}`` and ``{thing}``; the answer is the product."""
    thing = rng.choice(OBJECTS)
    a, b = _operands(rng, level)
    return numeric(
        "physics",
        level,
        kind,
        thing,
        text.format(a=a, b=b, thing=thing),
        product(a, b),
        (f"{a}+{b}={a + b}", f"{a}-{b}={a - b}") if a > b else (f"{a}+{b}={a + b}",),
        f"{rule}: {a}*{b}",
    )


def _force(level: int):
    return lambda rng: _two_factors(
        rng,
        level,
        "force",
        "a {a} kg {thing} accelerates at {b} m/s2. force in N?",
        "force is mass times acceleration",
    )


def _distance(level: int):
    return lambda rng: _two_factors(
        rng,
        level,
        "distance",
        "a {thing} moves at {a} m/s for {b} s. distance in m?",
        "distance is speed times time",
    )


def _work(level: int):
    return lambda rng: _two_factors(
        rng,
        level,
        "work",
        "a force of {a} N moves a {thing} by {b} m. work in J?",
        "work is force times distance",
    )


def _momentum(rng: Random) -> Question | None:
    thing = rng.choice(OBJECTS)
    mass, start, gain = rng.randint(2, 9), rng.randint(2, 19), rng.randint(2, 9)
    end = start + gain
    return numeric(
        "physics",
        3,
        "momentum",
        thing,
        f"a {mass} kg {thing} goes from {start} to {end} m/s. momentum gain?",
        f"{end}-{start}={gain} {product(gain, mass)}",
        (product(end, mass), f"{end}+{start}={end + start}"),
        f"take the gain in speed times mass: {end}-{start}",
    )


def _speed(rng: Random) -> Question | None:
    thing = rng.choice(OBJECTS)
    start, rate, time = rng.randint(5, 49), rng.randint(2, 9), rng.randint(2, 9)
    gain = rate * time
    return numeric(
        "physics",
        4,
        "speed",
        thing,
        f"a {thing} at {start} m/s gains {rate} m/s2 for {time} s. speed in m/s?",
        f"{product(rate, time)} {start}+{gain}={start + gain}",
        (
            f"{start}+{rate}={start + rate} "
            f"{start + rate}+{time}={start + rate + time}",
            product(start, rate),
        ),
        f"add acceleration times time: {rate}*{time}",
    )


def _large_force(rng: Random) -> Question | None:
    thing = rng.choice(OBJECTS)
    mass, rate = rng.randint(201, 899), rng.randint(21, 89)
    tens = rate // 10 * 10
    return numeric(
        "physics",
        5,
        "large force",
        thing,
        f"a {mass} kg {thing} accelerates at {rate} m/s2. force in N?",
        f"{mass * tens}+{mass * (rate - tens)}={mass * rate}",
        (f"{mass}+{rate}={mass + rate}", f"{mass}-{rate}={mass - rate}"),
        f"force is mass times acceleration: {mass}*{rate}",
    )


MAKERS = {
    1: (_force(1), _distance(1), _work(1)),
    2: (_force(2), _distance(2), _work(2)),
    3: (_momentum,),
    4: (_speed,),
    5: (_large_force,),
}
