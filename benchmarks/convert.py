"""Converting against mlx-vlm: seconds and peak memory for the same 1.5 GB checkpoint, interleaved in one run.

    .venv/bin/python -m benchmarks.convert                   --quick: a tenth of the size, one round, as CI runs it

Both read Hugging Face bfloat16 and write MLX with affine 4-bit experts and 8-bit for the rest. Every conversion is a
fresh process (``convert_worker.py``), because peak memory never falls; its time starts after the imports, which
flatters mlx-vlm (its imports take seconds). Ours syncs what it writes to the disk, hashes inputs and outputs and checks
the result; mlx-vlm does neither. The order alternates, so that both read from a warm page cache. Goal: at most its
time, and less memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.checkpoint import googles, write_tokenizer
from benchmarks.peers import ROOT, SCRATCH, cpu_model, git, spread

RESULTS = ROOT / "benchmarks" / "results" / "convert.json"
SHAPE = {  # 750 M parameters, in the proportions of the 26B model: nearly all of them experts
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 768,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 128,
    "global_head_dim": 256,
    "num_experts": 32,
    "top_k_experts": 4,
}
LAYERS, SHARD = 12, 400_000_000
ENVIRONMENTS = {"ours": ".venv", "mlx-vlm": ".venv-bench"}


def write(folder: Path, layers: int) -> Path:
    """The source, in shards of 400 MB, unless it is there already."""
    stamp, recipe = folder / "recipe.json", json.dumps([SHAPE, layers, SHARD])
    if stamp.is_file() and stamp.read_text() == recipe:
        return folder
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.tensors import tensor_table
    from tests.tiny import official_config

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    config = official_config(256, **SHAPE, num_hidden_layers=layers, layer_types=types)
    config.save_pretrained(folder)
    data = googles(json.loads((folder / "config.json").read_text()), SHAPE)
    (folder / "config.json").write_text(json.dumps(data))
    write_tokenizer(folder, SHAPE["vocab_size"])
    _write_weights(folder, tensor_table(ModelConfig.from_dict(data)))
    stamp.write_text(recipe)
    return folder


def _write_weights(folder: Path, table: dict[str, Any]) -> None:
    import ml_dtypes

    random, shard, held, shards, places = np.random.default_rng(0), {}, 0, [], {}
    for name, row in table.items():
        values = random.standard_normal(row.shape, np.float32) * row.shape[-1] ** -0.5
        shard[name] = values.astype(ml_dtypes.bfloat16)
        held += shard[name].nbytes
        if held > SHARD or name == next(reversed(table)):
            shards.append(shard)
            shard, held = {}, 0
            path = f"model-{len(shards):05}.safetensors"
            save_file(shards[-1], folder / path, {"format": "pt"})
            places |= dict.fromkeys(shards[-1], path)
            shards[-1] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def run(name: str, source: Path, threads: int) -> dict[str, Any]:
    """One conversion, its output thrown away."""
    out = SCRATCH / f"bench-convert-{name}"
    shutil.rmtree(out, ignore_errors=True)
    python = ROOT / ENVIRONMENTS[name] / "bin" / "python"
    if not python.is_file():
        raise SystemExit(f"{name} has no environment: {python.parent.parent} is missing; run `make bench`")
    variables = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "benchmarks.convert_worker", name, source, out]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}; its error is above")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1]) | {"written_bytes": written}


def measure(source: Path, rounds: int, threads: int) -> dict[str, Any]:
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in ENVIRONMENTS}
    for index in range(rounds):
        for name in list(ENVIRONMENTS)[:: 1 if index % 2 == 0 else -1]:
            kept[name].append(run(name, source, threads))
            last = kept[name][-1]
            print(f"  {name:<8}{last['seconds']:6.1f} s  peak {last['peak_bytes'] / 1e6:6.0f} MB", flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(kept["ours"], kept["mlx-vlm"], strict=True)]
    memory = [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(kept["ours"], kept["mlx-vlm"], strict=True)]
    return {"time_ratio": spread(ratios), "memory_ratio": spread(memory), "rounds": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description="time converting against mlx-vlm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round on a small checkpoint, without a goal for time")
    chosen = parser.parse_args()
    layers, rounds = (2, 1) if chosen.quick else (LAYERS, chosen.rounds)
    threads = os.cpu_count() or 1
    source = write(SCRATCH / f"bench-convert-source-{layers}", layers)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"HF bfloat16, {size / 1e9:.2f} GB, to MLX with 4-bit experts; {threads} threads", flush=True)
    commit = {"commit": git("rev-parse", "HEAD"), "cpu": cpu_model(), "threads": threads, "source_bytes": size}
    record = commit | measure(source, rounds, threads)
    out = SCRATCH / RESULTS.name if chosen.quick else RESULTS
    out.write_text(json.dumps(record, indent=1) + "\n")
    time, memory = record["time_ratio"]["median"], record["memory_ratio"]["median"]
    print(f"ours / mlx-vlm: time {time:.2f}, peak memory {memory:.2f}")
    if (time > 1 and not chosen.quick) or memory > 1:
        raise SystemExit("goal missed: both must be at most 1")


if __name__ == "__main__":
    main()
