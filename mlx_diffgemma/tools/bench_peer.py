"""A peer in a process of its own, which may be another Python's: loads a model once, then answers and times itself.

    python bench_peer.py (mlx-lm | mlx-vlm) MODEL

It imports nothing of this library. Lines of JSON: first out {"versions"} or {"missing"}; then per request {"prompt",
"tokens"} one {"seconds", "first", "tokens", "peak_memory"}, and of mlx-vlm also "steps" and "canvas_tokens". ``first``
is when the first text arrived, ``peak_memory`` is in GB. mlx-vlm is asked for the published sampler (entropy bound,
temperature 1, whole canvases), drafts shown.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Run = Callable[[str, int], Iterator[Any]]


def mlx_lm(model: str) -> tuple[Run, str]:
    """Autoregressive, greedy, with the chat template."""
    import mlx_lm as peer  # type: ignore[import-not-found]

    loaded, tokenizer = peer.load(model)

    def run(prompt: str, tokens: int) -> Iterator[Any]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return peer.stream_generate(loaded, tokenizer, ids, max_tokens=tokens)

    return run, peer.__version__


def mlx_vlm(model: str) -> tuple[Run, str]:
    import mlx_vlm as peer  # type: ignore[import-not-found]
    from mlx_vlm.prompt_utils import apply_chat_template  # type: ignore[import-not-found]

    loaded, processor = peer.load(model)

    def run(prompt: str, tokens: int) -> Iterator[Any]:
        text = apply_chat_template(processor, loaded.config, prompt)
        return peer.stream_generate(
            loaded,
            processor,
            text,
            max_tokens=tokens,
            temperature=1.0,
            diffusion_sampler="entropy-bound",
            diffusion_full_canvas=True,
            diffusion_show_unmasking=True,
            seed=0,
        )

    return run, peer.__version__


PEERS: dict[str, Callable[[str], tuple[Run, str]]] = {"mlx-lm": mlx_lm, "mlx-vlm": mlx_vlm}


def answer(run: Run, prompt: str, tokens: int) -> dict[str, Any]:
    start, first, last = time.perf_counter(), None, None
    for item in run(prompt, tokens):
        first, last = first or time.perf_counter() - start, item
    found = {"seconds": time.perf_counter() - start, "first": first, "tokens": 0, "peak_memory": 0.0}
    if last is not None:
        found |= {"tokens": last.generation_tokens, "peak_memory": last.peak_memory}
        steps = getattr(last, "diffusion_denoising_steps", None)
        found |= {} if steps is None else {"steps": steps, "canvas_tokens": last.diffusion_canvas_tokens}
    return found


def main() -> None:
    name, model = sys.argv[1:]
    # Answers get a descriptor of their own, so that nothing a library prints can fall between them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        run, version = PEERS[name](model)
    except ImportError as error:
        if error.name != name.replace("-", "_"):
            raise  # it is there, and lacks something itself
        print(json.dumps({"missing": name}), file=answers)
        return
    print(json.dumps({"versions": {name: version, "python": sys.version.split()[0]}}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(run, request["prompt"], request["tokens"])), file=answers)


if __name__ == "__main__":
    main()
