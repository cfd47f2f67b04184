"""A function of trees, compiled by ``mx.compile`` once per kind of argument.

Trees are dataclasses, tuples and lists of arrays; whatever else stands in them (numbers, flags, ``None``) is a constant
of the compiled function and part of its key, as are the shapes and dtypes of the arrays. So everything that changes
from call to call is an argument, and nothing of a request is captured by a closure.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import mlx.core as mx

T = TypeVar("T")
LEAF = object()  # where an array stood
MOST = 64  # some megabytes each


class Compiled(Generic[T]):
    """``function``, compiled. The ``MOST`` kinds of argument that were used last are kept."""

    def __init__(self, function: Callable[..., T]):
        self.function = function
        self._made: OrderedDict[Hashable, Callable[..., T]] = OrderedDict()
        self._traced = [0]

    @property
    def traces(self) -> int:
        """How often the function was traced."""
        return self._traced[0]

    def __call__(self, *args: Any) -> T:
        leaves: list[mx.array] = []
        skeleton = split(args, leaves)
        if skeleton not in self._made:
            self._made[skeleton] = compiled(self.function, skeleton, self._traced)
        self._made.move_to_end(skeleton)
        if len(self._made) > MOST:
            self._made.popitem(last=False)
        return self._made[skeleton](*leaves)


def compiled(function: Callable[..., T], skeleton: Any, traced: list[int]) -> Callable[..., T]:
    """``function`` of trees like ``skeleton``, as a function of their arrays; and ``traced`` counts how often it is.

    It knows nothing of who keeps it, so that weights are let go with the model and not when cycles are collected.
    """
    results: list[Any] = []

    def flat(*leaves: mx.array) -> list[mx.array]:
        out: list[mx.array] = []
        results[:] = [split(function(*join(skeleton, iter(leaves))), out)]
        traced[0] += 1
        return out

    fast = mx.compile(flat)

    def call(*leaves: mx.array) -> T:
        out = fast(*leaves)  # which may be what traces, and so fills ``results``
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
