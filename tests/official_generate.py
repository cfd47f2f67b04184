"""The official ``generate`` with our noise in place of torch's, and everything it decided written down.

Only the two sources of randomness are replaced: ``initialize_canvas`` returns our start and renoise tokens, and
``torch.multinomial`` becomes the inverse CDF of our uniforms. Every rule stays the official one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from mlx_diffgemma.sampling.noise import block_noise

KINDS = ("argmax", "draw", "accept", "stop")


@dataclass
class Trace:
    """One official run. Per block and step: accepted [B, C], next canvas [B, C] (before freezing), draft [B, C]."""

    sequences: np.ndarray | None = None
    tokens_per_forward: list[float] = field(default_factory=list)
    accepted: list[list[np.ndarray]] = field(default_factory=list)
    canvases: list[list[np.ndarray]] = field(default_factory=list)
    drafts: list[list[np.ndarray]] = field(default_factory=list)
    blocks: list[np.ndarray] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, np.inf))

    def came_close(self, kind: str, margin) -> None:
        self.margins[kind] = min(self.margins[kind], float(margin))


class Recorder:
    """A streamer that keeps drafts and blocks."""

    def __init__(self, trace: Trace):
        self.trace, self.prompt = trace, True

    def put(self, value) -> None:
        if not self.prompt:
            self.trace.blocks.append(value.numpy())
        self.prompt = False

    def put_draft(self, value) -> None:
        self.trace.drafts[-1].append(value.numpy())

    def end(self) -> None:
        pass


def generate(model, prompts: list[list[int]], seeds: list[int], *, adaptive: bool = True, **options) -> Trace:
    """Run ``model.generate`` on left-padded prompts. ``adaptive=False`` leaves the thresholds unset."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as official

    trace, at = Trace(), {"block": -1, "step": 0}
    length, vocab = model.config.canvas_length, model.config.text_config.vocab_size
    steps = options["max_denoising_steps"]

    def noise(name: str):
        size = {"steps": steps, "length": length, "vocab_size": vocab}
        return [getattr(block_noise(seed, block=at["block"], attempt=0, **size), name) for seed in seeds]

    def initialize(self, batch_size, device):
        if getattr(self, "fresh", True):  # the first call of a block
            at["block"], at["step"], self.fresh = at["block"] + 1, 0, False
            for steps_of_block in (trace.accepted, trace.canvases, trace.drafts):
                steps_of_block.append([])
            return torch.tensor(np.stack(noise("start"))).long()
        return torch.tensor(np.stack([row[at["step"]] for row in noise("renoise")])).long()

    def multinomial(probs, num_samples):
        uniform = torch.tensor(np.concatenate([row[at["step"]] for row in noise("draw")]))
        cumulated = probs.cumsum(-1)
        target = uniform[:, None] * cumulated[:, -1:]
        at["draw"] = (cumulated - target).abs().min(-1).values
        return (cumulated <= target).sum(-1, keepdim=True)

    accept, renoise = official.EntropyBoundSampler.accept_canvas, official.EntropyBoundSampler.renoise_canvas

    def accept_canvas(self, *args, **kwargs):
        out = accept(self, *args, **kwargs)
        trace.accepted[-1].append(self.accepted_token_mask.numpy().copy())
        logits = kwargs["logits"] if "logits" in kwargs else args[2]
        best = logits.topk(2, -1).values
        trace.came_close("argmax", (best[..., 0] - best[..., 1]).min())
        trace.came_close("draw", at["draw"].view(self.accepted_token_mask.shape)[self.accepted_token_mask].min())
        ranked = torch.distributions.Categorical(logits=logits).entropy().sort(-1).values
        trace.came_close("accept", (ranked.cumsum(-1) - ranked - bound).abs().min())
        trace.came_close("stop", (ranked.mean(-1) - confidence).abs().min())
        return out

    def renoise_canvas(self, *args, **kwargs):
        out = renoise(self, *args, **kwargs)
        trace.canvases[-1].append(out.numpy().copy())
        at["step"] += 1
        return out

    prepare = type(model)._prepare_denoiser_inputs

    def prepare_inputs(self, *args, sampler, **kwargs):
        sampler.fresh = True
        return prepare(self, *args, sampler=sampler, **kwargs)

    def no_stopping(self, config):
        return None

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    patches = [
        mock.patch.object(official.EntropyBoundSampler, "initialize_canvas", initialize),
        mock.patch.object(official.EntropyBoundSampler, "accept_canvas", accept_canvas),
        mock.patch.object(official.EntropyBoundSampler, "renoise_canvas", renoise_canvas),
        mock.patch.object(type(model), "_prepare_denoiser_inputs", prepare_inputs),
        mock.patch.object(torch, "multinomial", multinomial),
    ]
    if not adaptive:
        patches.append(mock.patch.object(type(model), "_prepare_diffusion_stopping_criteria", no_stopping))
    bound, confidence = options.pop("entropy_bound"), options.get("confidence_threshold", np.inf)
    for patch in patches:
        patch.start()
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            streamer=Recorder(trace),
            sampler_config=official.EntropyBoundSamplerConfig(entropy_bound=bound),
            **options,
        )
    finally:
        for patch in patches:
            patch.stop()
    trace.sequences = out.sequences[:, longest:].numpy()
    trace.tokens_per_forward = out.tokens_per_forward.tolist()
    return trace
