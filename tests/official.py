"""The official implementation under test conditions: transformers, DynamicCache, sdpa, one call per question.

Also the observer of decidedness: how close a router or an argmax came to choosing otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass
class Context:
    """What transformers has read: its cache, and which positions are not left padding."""

    cache: object
    valid: torch.Tensor


class Official:
    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        from transformers import DiffusionGemmaForBlockDiffusion

        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        self.model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, **options).eval()
        self.gaps: list[float] = []
        self.choices: list[np.ndarray] = []
        from transformers.models.diffusion_gemma import modeling_diffusion_gemma as official

        for module in self.model.model.modules():
            if isinstance(module, official.DiffusionGemmaTextRouter):
                module.register_forward_hook(self._watch)

    def _watch(self, module, inputs, output) -> None:
        probabilities, index = output[0], output[2]
        ranked = probabilities.float().sort(-1, descending=True).values
        k = index.shape[-1]
        if k < ranked.shape[-1]:
            self.gaps.append(float((ranked[:, k - 1] - ranked[:, k]).min()))
        self.choices.append(index.numpy())

    @torch.no_grad()
    def encode(self, rows: list[list[int]], context: Context | None = None) -> Context:
        """Read one batch, shorter rows padded on the left (first call) or all of one length (later calls)."""
        from transformers import DynamicCache

        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
        valid = mask if context is None else torch.cat([context.valid, mask], 1)
        cache = DynamicCache(config=self.model.config.text_config) if context is None else context.cache
        past = valid.shape[1] - longest
        out = self.model.model.encoder(
            input_ids=ids,
            attention_mask=valid,
            past_key_values=cache,
            position_ids=torch.arange(past, past + longest)[None],
        )
        self.hidden = out.last_hidden_state
        return Context(out.past_key_values, valid)

    @torch.no_grad()
    def encoder_log_p(self, tokens: list[int]) -> np.ndarray:
        """log p of every token but the first, from the encoder's own hidden states."""
        text = self.model.config.text_config
        hidden = self.encode([tokens]) and self.hidden
        logits = self.model.lm_head(hidden).float()
        logits = torch.tanh(logits / text.final_logit_softcapping) * text.final_logit_softcapping
        log_p = logits.log_softmax(-1)[0, :-1]
        return log_p.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()

    @torch.no_grad()
    def logits(self, context: Context, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        past, length = context.valid.shape[1], canvas.shape[1]
        mask = torch.cat([context.valid, torch.ones(canvas.shape, dtype=torch.bool)], 1)
        out = self.model(
            past_key_values=context.cache,
            decoder_input_ids=torch.tensor(canvas),
            decoder_attention_mask=mask,
            decoder_position_ids=torch.arange(past, past + length)[None],
            self_conditioning_logits=None if previous is None else torch.tensor(previous).to(self.model.dtype),
        )
        return out.logits.float().numpy()


def top_gap(logits: np.ndarray) -> float:
    """The smallest distance between the two best logits of a row."""
    best = np.partition(logits, -2, -1)[..., -2:]
    return float((best[..., 1] - best[..., 0]).min())
