"""Stock mlx-vlm in a process and an environment of its own: loads checkpoints, answers with logits, converts.

Lines of JSON on stdin and stdout; see ``HANDLERS`` for the requests. Run by ``tests/peers/stock.py``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def logits(folder: str, prompt: list[int], canvas: list[int], previous: str | None, out: str) -> dict[str, Any]:
    """float32 logits [C, V] of one canvas behind a prompt, written to ``out`` as .npy."""
    import mlx.core as mx
    import numpy as np
    from mlx_vlm.utils import load_model

    model = load_model(Path(folder))
    model.set_dtype(mx.float32)
    soft = None if previous is None else mx.array(np.load(previous))[None]
    found = model(mx.array([prompt]), canvas_ids=mx.array([canvas]), self_conditioning_logits=soft).logits
    np.save(out, np.array(found[0].astype(mx.float32)))
    return {}


def convert(folder: str, out: str, mode: str, bits: int, group_size: int) -> dict[str, Any]:
    """``mlx_vlm.convert`` with quantization; ``bits`` 0 writes dense weights."""
    from mlx_vlm.convert import convert

    quantize = {"quantize": True, "q_mode": mode, "q_bits": bits, "q_group_size": group_size} if bits else {}
    convert(folder, mlx_path=out, **quantize)
    return {}


HANDLERS = {"logits": logits, "convert": convert}


def main() -> None:
    # Answers get a descriptor of their own, so that nothing a library prints can fall between them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = HANDLERS[request.pop("do")](**request)
        except Exception as error:  # noqa: BLE001 - whatever it was, the test that asked shows it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
