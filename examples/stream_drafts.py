"""Watch an answer being denoised, one line per step: ``python examples/stream_drafts.py "words 347"``.

A draft is the model's present guess for the whole canvas. ``accepted`` says which tokens were certain enough to keep in
that step; the others return to noise. When a canvas has settled it is committed, and the next one starts.
"""

import argparse

from mlx_diffgemma import Block, Draft, Finished, load, stream_generate

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("prompt", nargs="?", default="recite jack")
arguments.add_argument("--model", default="demo", help="a hub name, a folder, or demo")
arguments.add_argument("--backend", default="auto", help="auto, mlx, cuda, cpu, reference")
options = arguments.parse_args()

model, processor = load(options.model, backend=options.backend)
for event in stream_generate(model, processor, options.prompt, seed=7, entropy_bound=0.01):
    match event:
        case Draft():
            settled = event.accepted.mean()
            print(f"canvas {event.block + 1} step {event.step:2} {settled:4.0%} settled  {event.text!r}")
        case Block():
            print(f"canvas {event.block + 1} finished after {event.steps} steps, adds {event.text!r}\n")
        case Finished():
            print(event.text)
