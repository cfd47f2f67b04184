"""Where a step's time goes: every operation of one real step, timed alone on the tensors that it was given there.

One step runs with a table of operations that writes down each call. The calls of a part (all layers' experts, say) are
then one CUDA graph, replayed by itself. Weights come from memory as in the step, because each layer has its own and
all of them together are many times the L2 cache. What no operation of the table does (embedding the canvas, accepting,
renoising, stopping) is timed as the step with every operation replaced by the result it gave: the part ``tail``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuda_backend.graphs import GraphState
from cuda_backend.kernels.ops import Ops
from cuda_backend.model import TorchModel
from cuda_backend.network import Network
from cuda_backend.step import State, step
from cuda_backend.weights import Weights

from .gpu_clock import Clock, milliseconds
from .gpu_floor import PARTS

PART_OF = {
    "experts": "experts",
    "canvas_attention": "attention",
    "chunk_attention": "attention",
    "look": "head",
    "soft": "soft",
}  # and "linear" by its weight; every other operation is one of the "rows"


@dataclass(frozen=True)
class Call:
    """One operation of a step, with the result it gave."""

    name: str
    part: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def recorded(model: TorchModel, state: State) -> list[Call]:
    """The operations of one step from ``state``, in order. Of a network's first step there is no soft part."""
    calls: list[Call] = []
    parts = parts_of(model.network.weights)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            part = PART_OF.get(name, "rows")
            if name == "linear":
                part = parts[id(args[1])]
            calls.append(Call(name, part, function, args, kwargs, result))
            return result

        return run

    step(model.config, with_ops(model.network, noting), state)
    return calls


def with_ops(network: Network, change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Network:
    """The network with every operation changed."""
    changed = {f.name: change(f.name, getattr(network.ops, f.name)) for f in dataclasses.fields(Ops)}
    return dataclasses.replace(network, ops=Ops(**changed))


def parts_of(weights: Weights) -> dict[int, str]:
    """The part that a product belongs to, by its weight."""
    conditioning = weights.self_conditioning
    found = {id(weight): "soft" for weight in (conditioning.gate_up_proj, conditioning.down_proj)}
    for layer in weights.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        found |= {id(weight): "linears" for weight in linears}
        found[id(layer.router.proj)] = "rows"
    return found


def tail(model: TorchModel, state: State, calls: list[Call]) -> Callable[[], Any]:
    """The step from ``state`` with every operation's result at hand."""

    def run() -> State:
        results = iter(calls)

        def given(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                call = next(results)
                assert call.name == name, f"{name} where the recorded step had {call.name}"
                return call.result

            return answer

        return step(model.config, with_ops(model.network, given), state)

    return run


def current(state: State | GraphState) -> State:
    """The tensors that a block's next step reads. A step must have been taken."""
    return state.captured.later if isinstance(state, GraphState) else state


def parts_ms(clock: Clock, model: TorchModel, state: State, seconds: float = 0.2) -> dict[str, float]:
    """Milliseconds of every part of the step from ``state``."""
    calls = recorded(model, state)
    found = {}
    for part in PARTS[:-1]:
        mine = [call for call in calls if call.part == part]

        def run(mine: list[Call] = mine) -> None:
            for call in mine:
                call()

        found[part] = milliseconds(clock, clock.capture(run), seconds) if mine else 0.0
    found["tail"] = milliseconds(clock, clock.capture(tail(model, state, calls)), seconds)
    return found
