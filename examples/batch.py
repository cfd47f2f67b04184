"""Answer several prompts in one batch; every row keeps its own seed and stops on its own.

``python examples/batch.py "words 12" "sort banana"``
"""

import argparse

from mlx_diffgemma import batch_generate, load

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("prompts", nargs="*", default=["words 347", "sort banana", "recite jack", "upper hello"])
arguments.add_argument("--model", default="demo", help="a hub name, a folder, or demo")
arguments.add_argument("--backend", default="auto", help="auto, mlx, cuda, cpu, reference")
options = arguments.parse_args()

model, processor = load(options.model, backend=options.backend)
results = batch_generate(model, processor, options.prompts, seed=7)

for prompt, result in zip(options.prompts, results, strict=True):
    print(f"{prompt}: {result.text!r} ({result.stats.blocks} canvases, {result.stats.forwards} steps)")
