"""One implementation in a process of its own: loads the checkpoint once, then answers requests to run and time it.

    python -m benchmarks.worker NAME FOLDER THREADS

Lines of JSON on stdin and stdout. The first line out is {"versions"}; then, per request {"steps", "blocks", "drafts"},
one {"seconds", "first_draft", "forwards"}: the wall time of one whole call of the implementation's public generation
function, from ids or text to a finished answer with nothing left running; the time until that call first handed over
a draft (``drafts`` asks for them where they are not free); the denoising steps it took.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import checkpoint

Timed = tuple[float | None, int]  # when the first draft came, on time.perf_counter; steps in all
Run = Callable[[int, int, bool], Timed]  # steps per block, blocks, drafts wanted
Opened = tuple[Run, Callable[[], None]]  # and a function that waits for the device


def ours(folder: str, backend: str) -> Run:
    """The public API, text of every draft included."""
    from mlx_diffgemma import Draft, Finished, load, stream_generate

    model, processor = load(folder, backend=backend)
    prompt = checkpoint.prompt_text()
    assert processor.prompt_ids(prompt) == tuple(checkpoint.prompt_ids())

    def run(steps: int, blocks: int, drafts: bool) -> Timed:
        first, forwards = None, 0
        options = {"max_denoising_steps": steps, "max_tokens": blocks * checkpoint.CANVAS, "seed": 0}
        for event in stream_generate(model, processor, prompt, **options):
            if first is None and isinstance(event, Draft):
                first = time.perf_counter()
            if isinstance(event, Finished):
                forwards = event.stats.forwards
        return first, forwards

    return run


def ours_mlx(folder: str, threads: int) -> Opened:
    import mlx.core as mx

    return ours(folder, "mlx"), mx.synchronize


def ours_torch(folder: str, threads: int) -> Opened:
    import torch

    torch.set_num_threads(threads)
    return ours(folder, "cpu"), nothing


def transformers(folder: str, threads: int) -> Opened:
    """``generate`` as it comes: sdpa, DynamicCache, entropy-bound sampler; ids in, ids out."""
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    torch.set_num_threads(threads)
    load = DiffusionGemmaForBlockDiffusion.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor([checkpoint.prompt_ids()])

    def run(steps: int, blocks: int, drafts: bool) -> Timed:
        streamer = FirstDraft() if drafts else None
        tokens = blocks * checkpoint.CANVAS
        torch.manual_seed(0)
        out = model.generate(ids, max_new_tokens=tokens, max_denoising_steps=steps, streamer=streamer)
        return streamer and streamer.came, round(tokens / out.tokens_per_forward.item())

    return run, nothing


class FirstDraft:
    """A transformers streamer that notes when the first draft came."""

    came: float | None = None

    def put(self, value: Any) -> None:
        pass

    def put_draft(self, value: Any) -> None:
        self.came = self.came or time.perf_counter()

    def end(self) -> None:
        pass


def mlx_vlm(folder: str, threads: int) -> Opened:
    """``stream_generate`` with the options that make it the published sampler; ids in, text out."""
    import mlx.core as mx
    import mlx_vlm as peer

    model, processor = peer.load(folder)
    ids = mx.array([checkpoint.prompt_ids()])

    def run(steps: int, blocks: int, drafts: bool) -> Timed:
        first, item = None, None
        for item in peer.stream_generate(
            model,
            processor,
            "",
            input_ids=ids,
            max_tokens=blocks * checkpoint.CANVAS,
            max_denoising_steps=steps,
            temperature=1.0,
            diffusion_sampler="entropy-bound",
            diffusion_full_canvas=True,
            diffusion_show_unmasking=drafts,
            seed=0,
        ):
            if first is None and item.is_draft and item.diffusion_step > 0:
                first = time.perf_counter()
        return first, item.diffusion_denoising_steps

    return run, mx.synchronize


def nothing() -> None:
    pass


# name -> how it is opened, and the packages whose versions matter for it
KINDS = {
    "mlx": (ours_mlx, ("mlx-diffgemma", "mlx", "numpy")),
    "mlx-vlm": (mlx_vlm, ("mlx-vlm", "mlx", "transformers", "numpy")),
    "cpu": (ours_torch, ("mlx-diffgemma", "torch", "numpy")),
    "transformers": (transformers, ("transformers", "torch", "numpy")),
}


def main() -> None:
    name, folder, threads = sys.argv[1:]
    # Answers get a descriptor of their own, so that nothing a library prints can fall between them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    opened, packages = KINDS[name]
    run, wait = opened(folder, int(threads))
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"versions": {"python": sys.version.split()[0], **versions}}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        wait()
        start = time.perf_counter()
        first, forwards = run(request["steps"], request["blocks"], request["drafts"])
        wait()
        seconds = time.perf_counter() - start
        draft = None if first is None else first - start
        print(json.dumps({"seconds": seconds, "first_draft": draft, "forwards": forwards}), file=answers)


if __name__ == "__main__":
    main()
