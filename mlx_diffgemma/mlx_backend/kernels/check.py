"""A self-check: before kernels are used, each runs beside its plain version on what a step of the model gives it.

It finds a compiler, a system or a chip that goes wrong on a kernel; for subtle mistakes there are the tests. Whoever
loads the model says how it is run: a prompt and two steps of a block, on the model's own weights, not compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ...errors import BackendError
from .choice import Choice
from .head import Seen
from .ops import FUSED, KERNELS, PLAIN, Operation, Ops

# Root mean square of the difference over that of the result: a few roundings of the dtype.
BOUNDS = {mx.float32: 1e-3, mx.float16: 4e-3, mx.bfloat16: 2e-2}
LOOSE = {"canvas_attention": 4.0}  # times as much: the plain version rounds scores, of which weights are exponentials
WORST = 8.0  # times as much: the largest difference over the largest value
AGREED = 0.9  # of rows, where a rounding may decide
CHUNK = 2**24  # values that are compared at a time; probabilities of a canvas are four times as many


def self_check(choice: Choice, dtype: mx.Dtype, run: Callable[[Ops], None], fused: Ops = FUSED) -> None:
    """Compare every kernel of ``choice`` with plain MLX while ``run`` runs the model on the operations it is given.

    Raises:
        BackendError: a kernel differs, or does not run; names it.
    """
    seen: set[str] = set()
    both = {name: beside(name, getattr(fused, name), choice, dtype, seen) for name in KERNELS if choice.on(name)}
    run(dataclasses.replace(PLAIN, **both))
    missed = {*choice.fused} - seen
    assert not missed, f"never called: {missed}"


def beside(name: str, fused: Operation, choice: Choice, dtype: mx.Dtype, seen: set[str]) -> Operation:
    """An operation that runs both, compares, and gives the plain result."""
    plain = getattr(PLAIN, name)

    def run(*args: Any, **named: Any) -> Any:
        seen.add(name)
        try:
            found = fused(*args, **named)
            mx.eval([*arrays(found)])
        except (RuntimeError, ValueError) as error:  # Metal does not compile it, or takes fewer threads than it has
            raise refused(name, choice, f"does not run ({str(error).partition(chr(10))[0]})") from error
        truth = plain(*args, **named)
        if isinstance(truth, Seen):
            good = alike(found, truth, args[0], dtype)
            truth = dataclasses.replace(truth, weight=None)  # a kernel leaves none, so probabilities are asked for too
        else:
            good = same(found, truth, dtype, LOOSE.get(name, 1.0))
        if not good:
            raise refused(name, choice, "does not give what plain MLX gives")
        return truth

    return run


def refused(name: str, choice: Choice, what: str) -> BackendError:
    place = choice.chip and choice.chip.name
    return BackendError(f"kernel {name!r} {what} on {place}: load with kernels='ops', and please report it")


# ---- comparing


def same(found: Any, truth: Any, dtype: mx.Dtype, loose: float = 1.0) -> bool:
    """Of all arrays of a result; whole numbers are equal."""
    pairs = [*arrays(found)], [*arrays(truth)]
    return len(pairs[0]) == len(pairs[1]) and all(close(*pair, dtype, loose) for pair in zip(*pairs, strict=True))


def arrays(result: Any) -> Iterator[mx.array]:
    if isinstance(result, mx.array):
        yield result
    elif dataclasses.is_dataclass(result):
        yield from arrays([getattr(result, f.name) for f in dataclasses.fields(result)])
    elif result is not None:
        for item in result:
            yield from arrays(item)


def close(found: mx.array, truth: mx.array, dtype: mx.Dtype, loose: float = 1.0) -> bool:
    """False where a number is none."""
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return False
    if not mx.issubdtype(truth.dtype, mx.floating):
        return bool(mx.array_equal(found, truth))
    flat = found.flatten(), truth.flatten()
    parts = [measured(*(x[at : at + CHUNK] for x in flat)) for at in range(0, truth.size, CHUNK)]
    square, most, square_of, most_of = zip(*parts, strict=True)
    bound = loose * BOUNDS[dtype]
    mean = sum(square) <= bound**2 * sum(square_of)
    return mean and all(x <= WORST * bound * max(most_of) for x in most)


def measured(found: mx.array, truth: mx.array) -> tuple[float, ...]:
    """Of the difference, then of ``truth``, [n] each: sum of squares and largest amount, in float32."""
    found, truth = found.astype(mx.float32), truth.astype(mx.float32)
    both = (found - truth, truth)
    return tuple(float(x) for y in both for x in ((y * y).sum(), mx.abs(y).max()))


def alike(found: Seen, truth: Seen, logits: mx.array, dtype: mx.Dtype) -> bool:
    """Of what ``look`` sees of ``logits`` [N, V]: ids are compared by what they stand for."""
    if not same(numbers(found), numbers(truth), dtype):
        return False
    vocab = logits.shape[-1]
    ids = [mx.clip(seen.argmax, 0, vocab - 1)[:, None] for seen in (found, truth)]
    one, other = (mx.take_along_axis(logits, each, -1).astype(mx.float32) for each in ids)
    as_great = mx.abs(one - other) <= BOUNDS[dtype] * mx.maximum(mx.abs(other), 1)
    near = mx.abs(found.drawn - truth.drawn) <= vocab // 64
    good = bool(as_great.all()) and share(near) >= AGREED
    return good and (truth.count is None or as_many(found, truth))


def numbers(seen: Seen) -> list[mx.array]:
    """``greatest`` may be the next number of the dtype, and ``total`` with it; the log of the sum is the same."""
    return [seen.entropy, seen.confidence, seen.greatest, seen.greatest + mx.log(seen.total)]


def as_many(found: Seen, truth: Seen) -> bool:
    """Survivors: as many but for those at the edge, and the same."""
    if found.count is None or found.ids is None or truth.count is None or truth.ids is None:
        return False
    if found.ids.shape != truth.ids.shape:
        return False
    equal = (found.ids == truth.ids).all(-1)
    near = mx.abs(found.count - truth.count) <= mx.maximum(truth.count // 100, 1)
    return share(near) >= AGREED and share(equal) >= AGREED


def share(true: mx.array) -> float:
    return float(true.astype(mx.float32).mean())
