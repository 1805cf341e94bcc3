"""Cases of tests that have many of them: some run always, the others with --slow."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

SLOW = pytest.mark.slow
SLOW_WITHOUT_GPU = pytest.mark.slow_without_gpu  # Triton's kernels: seconds by the interpreter, nothing on a GPU


def each_value_once(*axes: Sequence[Any], mark: pytest.MarkDecorator = SLOW) -> list[ParameterSet]:
    """All combinations of the axes' values, for `parametrize`; all but some that show each value once are marked."""
    return _combinations(axes, 1, mark)


def each_pair_once(*axes: Sequence[Any], mark: pytest.MarkDecorator = SLOW) -> list[ParameterSet]:
    """The same, but of every two axes each pair of values is shown."""
    return _combinations(axes, 2, mark)


def some(cases: Sequence[Any], *shown: int, mark: pytest.MarkDecorator = SLOW) -> list[ParameterSet]:
    """The cases, for `parametrize`; all but those of the indices `shown` are marked."""
    return [
        pytest.param(*_values(case), marks=[] if i in shown else [mark], id=_id(case) if _is_named(case) else None)
        for i, case in enumerate(cases)
    ]


def _combinations(axes: Sequence[Sequence[Any]], together: int, mark: pytest.MarkDecorator) -> list[ParameterSet]:
    """Greedily: the next one shown is always that with the most tuples of `together` values not shown before."""
    all_places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    tuples_of = {places: set(itertools.combinations(enumerate(places), together)) for places in all_places}
    missing = set().union(*tuples_of.values())
    shown = set()
    while missing:
        best = max(all_places, key=lambda places: len(tuples_of[places] & missing))
        shown.add(best)
        missing -= tuples_of[best]
    combinations = []
    for places in all_places:
        cases = [axis[i] for axis, i in zip(axes, places, strict=True)]
        values = [case.values[0] if _is_named(case) else case for case in cases]
        marks = [] if places in shown else [mark]
        combinations.append(pytest.param(*values, marks=marks, id="-".join(map(_id, cases))))
    return combinations


def _is_named(case: Any) -> bool:
    return isinstance(case, ParameterSet)


def _values(case: Any) -> tuple[Any, ...]:
    if _is_named(case):
        return tuple(case.values)
    return case if isinstance(case, tuple) else (case,)


def _id(case: Any) -> str:
    return str(case.id) if _is_named(case) else str(getattr(case, "__name__", case))
