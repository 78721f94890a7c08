"""How a call of the sampler is cut up, from its sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxrl_post.sharding.mesh import BATCH_AXES, auto_axes


@dataclass(frozen=True)
class Plan:
    """How a call is cut up: what follows from its sizes and the mesh that is set.

    Attributes:
      prompts, width: P and S of the contexts.
      group_size: G.
      slots: most sequences side by side; None: all.
      prefill_tokens, continuous: as in `Sampler`.
      sizes: of the mesh's axes.
    """

    prompts: int
    width: int
    group_size: int
    slots: int | None
    prefill_tokens: int
    continuous: bool
    sizes: Mapping[str, int] = field(default_factory=auto_axes)

    @property
    def shards(self) -> int:
        """Parts that the batch is split in."""
        return math.prod(self.sizes.get(axis, 1) for axis in BATCH_AXES)

    @property
    def on_mesh(self) -> bool:
        """Whether there is more than one device."""
        return math.prod(self.sizes.values()) > 1

    @property
    def shrinks(self) -> bool:
        """Whether fewer slots are computed as sequences run out."""
        return self.continuous and not self.on_mesh

    @property
    def at_once(self) -> bool:
        """Whether all sequences are decoded side by side, on one device."""
        every = self.prompts * self.group_size
        return not self.on_mesh and (self.slots is None or every <= self.slots)

    @property
    def refilled(self) -> int | None:
        """The slots, if they are refilled; None where there are waves."""
        every = self.prompts * self.group_size
        few = self.slots is not None and self.slots < every
        return self.slots if self.shrinks and few else None

    def resident(self) -> int:
        """Contexts that are held for slots that are refilled."""
        assert self.slots is not None
        needed = max(2 * -(-self.slots // self.group_size), self.slots // 2)
        return power_of_two(min(self.prompts, needed))

    def chunks(self, rows: int, prompts: int) -> tuple[int, int]:
        """The contexts, and columns of them, of a forward pass.

        As many contexts as the limit on its tokens permits, or some columns of one. On
        a mesh it is over all, which are split already.

        Args:
          rows: contexts that there is room for.
          prompts: those that are wanted, now or later.
        """
        limit = self.prefill_tokens * self.shards
        many = rows if self.on_mesh else max(1, limit // self.width)
        if rows < prompts:
            many = min(many, max(1, rows // 2))  # some, while others are in use
        many = min(many, rows)
        parts = min(self.width, -(-many * self.width // limit))
        return many, -(-self.width // parts)

    def waves(self) -> Iterator[tuple[range, list[np.ndarray]]]:
        """C prompts at a time, and the waves that their sequences are decoded in.

        A wave is the rows ``[C, M]`` of its sequences in the result, -1 for fillers:
        C whole groups, or where `slots` is smaller than a group (on each shard of the
        batch) a part of each of C groups.

        Raises:
          ValueError: fewer slots than shards.
        """
        prompts, group_size, shards = self.prompts, self.group_size, self.shards
        slots = self.slots
        needed = -(-prompts // shards)
        if slots is not None and slots < shards:
            raise ValueError(
                f"slots={slots} is less than one sequence for each of the {shards} "
                f"shards of the batch; set it to a multiple of {shards}."
            )
        each = needed * group_size if slots is None else slots // shards
        parts = -(-group_size // each)
        members = -(-group_size // parts)
        groups = shards * min(each // members, power_of_two(needed))
        for first in range(0, prompts, groups):
            group = np.arange(first, first + groups)[:, None]
            waves = []
            for part in range(parts):
                member = np.arange(part * members, (part + 1) * members)[None]
                real = (group < prompts) & (member < group_size)
                rows = np.where(real, group * group_size + member, -1)
                waves.append(rows.astype(np.int32))
            yield range(first, first + groups), waves


def slot_sizes(slots: int, *, factor: int = 4, least: int = 16) -> list[int]:
    """The sizes that `slots` shrink to as sequences run out.

    Each costs a compilation, hence few; below `least` none is worth it.

    >>> slot_sizes(128)
    [128, 32, 8]
    """
    sizes = [slots]
    while sizes[-1] >= least:
        sizes.append(sizes[-1] // factor)
    return sizes


def capacity_for(tokens: int, limit: int, *, least: int = 128) -> int:
    """Columns of a cache for sequences of so many tokens: few sizes, few programs.

    >>> [capacity_for(n, 1024) for n in (1, 128, 129, 700, 2000)]
    [128, 128, 256, 1023, 1023]
    """
    capacity = least
    while capacity < tokens:
        capacity *= 2
    return max(1, min(capacity, limit - 1))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`.

    >>> [power_of_two(n) for n in (1, 3, 4)]
    [1, 4, 4]
    """
    return 1 << (number - 1).bit_length()
