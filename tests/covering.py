"""Parameter combinations in which every pair of values appears; the rest of the full grid is marked `slow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return few combinations of indices, one below each size, such that every pair of two axes' values appears.

    Greedy and deterministic: each combination is the one that covers most of what is still missing.
    """

    def pairs(combination: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, j, combination[i], combination[j]) for i, j in combinations(range(len(sizes)), 2)}

    grid = list(product(*map(range, sizes)))
    missing = set().union(*map(pairs, grid))
    if not missing:
        return grid
    chosen = []
    while missing:
        best = max(grid, key=lambda combination: len(pairs(combination) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return sorted(chosen)


def covering(
    axes: Mapping[str, Sequence[Any] | Mapping[str, Any]], strength: int = 2, indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Parametrize a test by a covering array of its axes, and by the rest of their grid as `slow` tests.

    Args:
        indirect: the axes that are fixtures.
        strength: 2 for every pair of two axes' values; 1 for every value of each axis.
        axes: values of each argument, or a mapping of ids to values. The axis `"a,b"` is of two arguments, and its
            values are tuples.
    """
    names = [name for axis in axes for name in axis.split(",")]
    ids, values = [], []
    for name, axis in axes.items():
        items = list(axis.items()) if isinstance(axis, Mapping) else [(_id(value), value) for value in axis]
        ids.append([key for key, _ in items])
        values.append([value if "," in name else (value,) for _, value in items])
    sizes = [len(axis) for axis in values]
    each_value = {tuple(index % size for size in sizes) for index in range(max(sizes))}
    fast = set(pairwise(sizes)) if strength == 2 else each_value
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(part for axis, index in zip(values, combination, strict=True) for part in axis[index]),
                marks=() if combination in fast else pytest.mark.slow,
                id="-".join(axis[index] for axis, index in zip(ids, combination, strict=True)),
            )
            for combination in product(*(range(len(axis)) for axis in values))
        ],
        indirect=list(indirect),
    )


def _id(value: Any) -> str:
    return "-".join(map(_id, value)) if isinstance(value, tuple | list) else str(value).removeprefix("torch.")


def mostly_slow(values: Sequence[Any], fast: Sequence[Any]) -> list[Any]:
    """Return parameters of which only the `fast` ones are not marked `slow`."""
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
