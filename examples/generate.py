"""Answer one prompt: ``python examples/generate.py "words 347"``. The demo checkpoint needs no download."""

import argparse

from mlx_diffgemma import generate, load

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("prompt", nargs="?", default="json name=bob age=3")
arguments.add_argument("--model", default="demo", help="a hub name, a folder, or demo")
arguments.add_argument("--backend", default="auto", help="auto, mlx, cuda, cpu, reference")
options = arguments.parse_args()

model, processor = load(options.model, backend=options.backend)
result = generate(model, processor, options.prompt, max_tokens=256, seed=7)

print(result.text)
print(f"({result.finish_reason}, {result.stats.tokens} tokens in {result.stats.forwards} steps)")
