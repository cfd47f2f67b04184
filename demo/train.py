"""Train the demo checkpoint on a CPU: ``python demo/train.py --minutes 100 --out build/demo``.

Objective, as published for DiffusionGemma fine-tuning: noise level t per example, every canvas token replaced by a
uniform random token with probability t, cross-entropy against the clean canvas on all positions, padding included;
half of the batches are conditioned on the logits of a first pass without gradient. Matrices are trained with Muon
(orthogonalised momentum), everything else with AdamW. ``export.py`` turns the result into an official checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from network import CANVAS, VOCAB, Network
from safetensors.torch import load_file, save_file
from tasks import NAMES_OF_TASKS, draw
from vocabulary import END_OF_TURN, PAD, chat, encode

HARD = {"sudoku6": 3.5, "add": 2.5, "sort": 2.5, "range": 1.5, "dialog": 1.5, "sudoku4": 1.0, "upper": 0.5}
WEIGHTS = {name: HARD.get(name, 0.7) for name in NAMES_OF_TASKS}


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps (K. Jordan, 2024); torch.optim.Muon has no expert banks."""

    def __init__(self, params, lr: float, decay: float = 0.01):
        super().__init__(list(params), {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        banks: dict[torch.Size, list] = {}
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)
            pairs = zip(p.view(-1, *p.shape[-2:]), update.view(-1, *p.shape[-2:]), strict=True)
            banks.setdefault(p.shape[-2:], []).extend(pairs)
        for (rows, columns), bank in banks.items():
            x = orthogonal(torch.stack([u for _, u in bank]))
            for (p, _), u in zip(bank, x, strict=True):
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(u, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.mT if tall else x


def sample(rng: random.Random) -> tuple[list[int], list[int]]:
    """Context ids (the chat prompt and the canvases already committed) and one clean canvas."""
    name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    example = draw(name, rng, held=False)
    answer = [*encode(example.answer), END_OF_TURN]
    block = rng.randrange(-(-len(answer) // CANVAS))
    start = block * CANVAS
    canvas = answer[start : start + CANVAS]
    return chat(example.prompt, example.history) + answer[:start], canvas + [PAD] * (CANVAS - len(canvas))


def batches(size: int, rng: random.Random):
    """Endless batches, sorted by length eight at a time so that left padding stays small."""
    while True:
        pool = sorted((sample(rng) for _ in range(8 * size)), key=lambda e: len(e[0]) + rng.random() * 4)
        chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            longest = max(len(context) for context, _ in chunk)
            tokens = torch.tensor([[PAD] * (longest - len(c)) + c for c, _ in chunk])
            valid = torch.tensor([[False] * (longest - len(c)) + [True] * len(c) for c, _ in chunk])
            yield tokens, valid, torch.tensor([canvas for _, canvas in chunk])


def loss_of(net: Network, tokens, valid, clean, rng: random.Random):
    """Cross-entropy plus 1 % load balance; also the share of very noisy canvases restored in one step."""
    t = torch.rand(len(clean), 1) ** 0.65  # favours high noise, where generation starts
    noisy = torch.where(torch.rand(clean.shape) < t, torch.randint(VOCAB, clean.shape), clean)
    prefix, balance = net.encode(tokens, valid)
    soft = torch.zeros(*clean.shape, net.model.decoder.embed_tokens.embedding_dim)
    if rng.random() < 0.5:
        with torch.no_grad():
            soft = net.soften(net.decode(noisy, prefix, valid, soft)[0])
    logits, canvas_balance = net.decode(noisy, prefix, valid, soft)
    entropy = F.cross_entropy(logits.reshape(-1, VOCAB), clean.reshape(-1))
    exact = (logits.argmax(-1) == clean).all(1).float()[t[:, 0] > 0.75].mean()
    return entropy + 0.005 * (balance + canvas_balance), entropy.detach(), exact


def optimizers(net: Network, lr: float, muon: float):
    matrices = [p for n, p in net.named_parameters() if p.ndim > 1 and "embed_tokens" not in n and "router" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0), Muon(matrices, muon)]


def initial(path: str | None) -> Network:
    net = Network()
    if path:
        stored = {k: v.float() for k, v in load_file(path).items() if "vision" not in k}
        net.load_state_dict(stored)
    scalars = [p for n, p in net.named_parameters() if n.endswith("layer_scalar")]
    if all(bool(p == 1) for p in scalars):  # encoder and decoder must differ, as in the real model
        for p in scalars:
            torch.nn.init.uniform_(p, 0.8, 1.2)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of AdamW")
    parser.add_argument("--muon", type=float, default=0.015, help="peak of Muon")
    parser.add_argument("--init", help="safetensors file to start from")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    net = initial(options.init)
    optims, peaks = optimizers(net, options.lr, options.muon), (options.lr, options.muon)
    options.out.mkdir(parents=True, exist_ok=True)
    start, log, mean, saved = time.time(), [], {}, 0.0
    for step, (tokens, valid, clean) in enumerate(batches(options.batch, rng), 1):
        progress = (time.time() - start) / 60 / options.minutes
        if progress >= 1:
            break
        scale = min(1, step / 50, max(0.01, (1 - progress) / 0.7))  # warm up, hold 30 %, then down in a line
        for optimizer, peak in zip(optims, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.zero_grad()
        loss, entropy, exact = loss_of(net, tokens, valid, clean, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
        for key, value in (("entropy", float(entropy)), ("exact", float(exact))):
            if value == value:
                mean[key] = mean.get(key, value) * 0.98 + value * 0.02
        if step % 100 == 0:
            log.append({"step": step, "minutes": round(progress * options.minutes, 2)} | mean)
            print(json.dumps(log[-1]), flush=True)
        if time.time() - saved > 300:
            saved = time.time()
            save_file(net.state_dict(), options.out / "weights.safetensors")
    save_file(net.state_dict(), options.out / "weights.safetensors")
    (options.out / "train_log.json").write_text(json.dumps(log, indent=0))


if __name__ == "__main__":
    main()
