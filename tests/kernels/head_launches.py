"""What ``head.py`` launches on the 26B model; see ``compiling.py``."""

import torch

from cuda_backend.kernels.cards import Card
from cuda_backend.kernels.head import Bias, Seen, look_kernel, soft_kernel
from cuda_backend.kernels.quantize import Fp8Rows

FP8_ONLY = False
V, D = 262144, 2816


def launches(card: Card) -> None:
    meta = torch.device("meta")
    table = torch.empty(V, D, dtype=torch.bfloat16, device=meta)
    fp8 = Fp8Rows(torch.empty(V, D, dtype=torch.float8_e4m3fn, device=meta), torch.empty(V, 1, device=meta))
    for rows, classes, table_fp8 in [(256, 0, None), (256, 2, None), (4096, 0, None), (256, 0, fp8)]:
        if table_fp8 is not None and not card.fp8:
            continue
        hidden = torch.empty(rows, D, dtype=torch.bfloat16, device=meta)
        temperature = torch.empty(rows, device=meta)
        bias = None
        if classes:
            bias = Bias(torch.empty(V, dtype=torch.int32, device=meta), torch.empty(rows, classes, device=meta))
        rest = {"card": card, "temperature": temperature, "bias": bias, "table_fp8": table_fp8}
        seen = look_kernel(hidden, table, 30.0, uniform=temperature, **rest)
        assert isinstance(seen, Seen)
        soft_kernel(hidden, table, 30.0, scale=53.0, seen=seen, **rest)
