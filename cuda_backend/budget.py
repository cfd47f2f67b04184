"""What a model takes on its device, added up before it is loaded: weights, cache, and the buffers of a forward.

Weights, embedding and cache are exact, the tests say so. Activations are bounds on what is alive at once, counted
operation by operation; what CUDA itself takes is an estimate. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mlx_diffgemma.backend import LoadOptions
from mlx_diffgemma.config import ModelConfig, TextConfig
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.formats.checkpoint import EMBEDDING
from mlx_diffgemma.formats.encoding import Encoding
from mlx_diffgemma.memory import MemoryPlan, is_packed, width_of
from mlx_diffgemma.tensors import VISION, item_bytes, tensor_table

from .cache import capacity
from .kernels import attention_plan, choice, head, logits
from .kernels.cards import Card
from .kernels.unpack import unsupported
from .linear import PIECE, Quantized, fp8_product
from .model import CHUNK
from .rooms import ROOMS

TOKENS = 4096  # per row, for which a model is planned when it is loaded
RUNTIME = 2**29  # CUDA's context, its libraries' workspaces, kernels, the nodes of graphs: an estimate
TILE = 128 * 256  # values that a program of the attention keeps, at most


@dataclass(frozen=True)
class Setting:
    """What the buffers depend on.

    Args:
        width: bytes of an element.
        chunk: tokens of a row that are read together.
        card: of the kernels, None where operations are plain.
        graphs: whether steps are captured.
        whole: of the cache, see ``TorchCache``.
    """

    config: ModelConfig
    width: int
    batch: int
    tokens: int
    chunk: int
    card: Card | None = None
    graphs: bool = False
    whole: bool = False
    device: str = "cpu"

    @property
    def text(self) -> TextConfig:
        return self.config.text

    @property
    def step_rows(self) -> int:
        """Of a block's first step: a finished canvas and the next one."""
        return 2 * self.batch * self.config.canvas_length


def plan(
    config: ModelConfig,
    stored: int,
    checkpoint: Checkpoint | None,
    *,
    device: str,
    options: LoadOptions,
    batch: int = 1,
    tokens: int = TOKENS,
) -> MemoryPlan:
    """See ``mlx_diffgemma.backend.Backend``. ``tokens``: of prompt and answer, per row of the batch.

    Raises:
        OptionError, BackendError: options that the device cannot have.
    """
    place, gpu = torch.device(device), choice.gpu_of(torch.device(device), options.kernels)
    dtype = options.dtype or (checkpoint.dtype if checkpoint else "float32" if item_bytes(config) == 4 else "bfloat16")
    choice.check(options, gpu)
    rows = choice.proven_rows()
    fused = gpu is not None and not choice.why_not("experts", options.kernels, gpu, dtype, rows)
    card = gpu.card if gpu and fused else None
    graphs = place.type == "cuda" and not choice.why_not("graph", options.kernels, gpu, dtype, rows)
    tokens = min(tokens, config.text.max_position_embeddings)
    whole = graphs or not choice.why_not("canvas_attention", options.kernels, gpu, dtype, rows)
    width, chunk = width_of(config, dtype), CHUNK[place.type]
    setting = Setting(config, width, batch, tokens, chunk, card, graphs, whole, place.type)
    held = weight_bytes(checkpoint, setting.width, options.activations is not None) if checkpoint else {}
    table = config.text.vocab_size * config.text.hidden_size
    parts = {
        "weights": sum(held.values()) if checkpoint else guessed(config, stored, setting.width),
        "embedding": table * setting.width,
        "head": table + 4 * config.text.vocab_size if options.head else 0,
        "cache": cache_bytes(setting),
        "activations": forward_bytes(setting, max(setting.step_rows, batch * min(tokens, setting.chunk))),
        "vocabulary": vocabulary_bytes(setting),
        "unpacking": unpacking_bytes(setting, list(held)),
        "graphs": graphs_bytes(setting),
        "runtime": RUNTIME if place.type == "cuda" else 0,
    }
    return MemoryPlan({name: size for name, size in parts.items() if size}, tokens, batch)


# ---- what is kept


def weight_bytes(checkpoint: Checkpoint, width: int, fp8: bool) -> dict[Encoding, int]:
    """All text weights but the embedding, by how they are held: packed matrices as they are stored, norms float32.

    ``fp8``: activations are in FP8, for which the weights' scales are float32.
    """
    found: dict[Encoding, int] = {}
    for name, row in checkpoint.table.items():
        if row.role in VISION or name == EMBEDDING:
            continue
        encoding = checkpoint.tensors[name].encoding
        if not encoding.quantized or len(row.shape) < 2:
            encoding = Encoding(dtype="float32" if row.role == "norm" or width == 4 else "bfloat16")
        elif fp8 and fp8_product(encoding, row.shape):
            encoding = replace(encoding, dtype="float32")
        found[encoding] = found.get(encoding, 0) + encoding.nbytes(row.shape)
    return found


def guessed(config: ModelConfig, stored: int, width: int) -> int:
    """The same from the size of the files, before they are here."""
    if is_packed(config, stored):
        return stored
    text = sum(row.size for row in tensor_table(config).values() if row.role not in VISION and row.name != EMBEDDING)
    return min(stored // item_bytes(config), text) * width


def cache_bytes(setting: Setting) -> int:
    """Keys and values of all rows, in buffers that grew as ``TorchCache`` has them grow."""
    text, slots = setting.text, 0
    for layer, (heads, dim) in enumerate(zip(text.num_key_value_heads, text.head_dims, strict=True)):
        limit = None if text.full(layer) else text.window_keys
        slots += 2 * heads * dim * (setting.config.canvas_length + slots_of(setting, limit))
    return setting.batch * setting.width * slots


def slots_of(setting: Setting, limit: int | None) -> int:
    """Of a buffer, behind the canvas's, once the tokens have been read; a ring stops at ``limit``."""
    return capacity(0, setting.tokens, limit, setting.whole, setting.device)


def graphs_bytes(setting: Setting) -> int:
    """A captured step has buffers of its own, and the cache may have grown out of a room that is still kept."""
    if not setting.graphs:
        return 0
    step = forward_bytes(setting, setting.step_rows) + vocabulary_bytes(setting)
    return step + (ROOMS - 1) * cache_bytes(setting)


# ---- what comes and goes


def forward_bytes(setting: Setting, rows: int) -> int:
    """What is alive at once in a forward of ``rows`` tokens: around the attention, the dense MLP or the experts."""
    text, width = setting.text, setting.width
    stream = 8 * width * text.hidden_size
    if setting.card is None:
        stream += 16 * text.hidden_size  # float32 copies in norms
    kinds = list(zip(text.num_key_value_heads, text.head_dims, strict=True))
    attention = max(width * dim * (4 * text.num_attention_heads + 4 * heads) for heads, dim in kinds)
    dense = 4 * width * text.intermediate_size
    kept, made = (1, 2) if setting.card else (2, 4)
    pair = width * (kept * text.hidden_size + made * text.moe_intermediate_size) + 32
    experts = text.top_k_experts * pair + 16 * text.num_experts
    return rows * (stream + max(attention, dense, experts)) + scores_bytes(setting, rows)


def scores_bytes(setting: Setting, rows: int) -> int:
    """Within attention: a kernel's parts of results; in torch, as if all float32 scores of a layer were kept."""
    if setting.card is not None:
        one = max(setting.text.head_dims) * setting.text.num_attention_heads * rows
        return 4 * min(attention_plan.SPLITS[-1] * one, attention_plan.MOST_WAVES * setting.card.processors * TILE)
    seen = setting.config.canvas_length + slots_of(setting, None) + rows // setting.batch
    return 4 * rows * setting.text.num_attention_heads * seen


def vocabulary_bytes(setting: Setting) -> int:
    """Both passes over the vocabulary, of which one runs at a time: a chunk of logits, and sums of all spans."""
    rows, width = setting.batch * setting.config.canvas_length, setting.width
    dtype = torch.float32 if width == 4 else torch.bfloat16
    table = torch.empty(setting.text.vocab_size, setting.text.hidden_size, dtype=dtype, device="meta")
    hidden, vocab = setting.text.hidden_size, len(table)
    if setting.card is not None:
        cut = head.kernel_cut(rows, table, setting.card)
        return rows * (min(cut.chunk, vocab) * width + 4 * math.ceil(vocab / cut.span) + hidden * (4 + width))
    cut = logits.plain_cut(rows, table)
    chunk = min(cut.chunk, vocab)
    per_logit = 16 if width == 2 else 8  # as rounded, in float32, and the weights
    weighing = rows * chunk * per_logit + min(logits.BUFFER, 4 * chunk * hidden)  # a CPU widens a piece of the table
    drawing = 3 * min(logits.BUFFER, rows * cut.span * hidden * width)
    sums = 8 * 4 * rows * math.ceil(vocab / cut.span)
    return max(weighing, drawing) + sums + rows * hidden * (4 + width)


def unpacking_bytes(setting: Setting, encodings: list[Encoding]) -> int:
    """Where a packed weight has no kernel: the largest bank in the model's dtype, and a piece of it in float32."""
    plain = [e for e in encodings if e.quantized and (setting.card is None or unpacked(e, setting.card))]
    if not plain:
        return 0
    text = setting.text
    bank = text.num_experts * 2 * text.moe_intermediate_size * text.hidden_size
    return bank * setting.width + 9 * min(PIECE, bank)


def unpacked(encoding: Encoding, card: Card) -> bool:
    return bool(unsupported(Quantized(encoding, (), {}), card))
