"""A function of trees, compiled by ``mx.compile`` once per kind of argument.

Trees are dataclasses, tuples and lists of arrays; whatever else stands in them (numbers, flags, ``None``) is a constant
of the compiled function and part of its key, as are the shapes and dtypes of the arrays. So everything that changes
from call to call is an argument, and nothing of a request is captured by a closure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import mlx.core as mx

T = TypeVar("T")
LEAF = object()  # where an array stood


class Compiled(Generic[T]):
    """``function``, compiled. ``traces`` counts how often it was traced."""

    def __init__(self, function: Callable[..., T]):
        self.function = function
        self.traces = 0
        self._made: dict[Hashable, Callable[..., T]] = {}

    def __call__(self, *args: Any) -> T:
        leaves: list[mx.array] = []
        skeleton = split(args, leaves)
        if skeleton not in self._made:
            self._made[skeleton] = self._make(skeleton)
        return self._made[skeleton](*leaves)

    def _make(self, skeleton: Any) -> Callable[..., T]:
        results: list[Any] = []

        def traced(*leaves: mx.array) -> list[mx.array]:
            self.traces += 1
            out: list[mx.array] = []
            results[:] = [split(self.function(*join(skeleton, iter(leaves))), out)]
            return out

        compiled = mx.compile(traced)

        def call(*leaves: mx.array) -> T:
            out = compiled(*leaves)
            return join(results[0], iter(out))

        return call


def split(tree: Any, leaves: list[mx.array]) -> Hashable:
    """The tree without its arrays, which are appended to ``leaves``."""
    if isinstance(tree, mx.array):
        leaves.append(tree)
        return LEAF
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), tuple(split(getattr(tree, f.name), leaves) for f in dataclasses.fields(tree))
    if isinstance(tree, tuple | list):
        return type(tree), tuple(split(item, leaves) for item in tree)
    return tree


def join(skeleton: Any, leaves: Iterator[mx.array]) -> Any:
    """The inverse of ``split``."""
    if skeleton is LEAF:
        return next(leaves)
    if isinstance(skeleton, tuple):
        kind, parts = skeleton
        items = [join(part, leaves) for part in parts]
        return kind(items) if kind in (tuple, list) else kind(*items)
    return skeleton
