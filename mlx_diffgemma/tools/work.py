"""What one denoising step reads, writes and multiplies, counted from shapes alone: in plain MLX, and with every kernel.

The plain version is that of ``mlx_backend.kernels.*_ops`` in a compiled step, as it runs on a Mac without kernels.

Rules, the same for both versions; the tests hold the first three against graphs that MLX makes of these functions:

- Every array that an operation reads or writes counts once, whether or not a chip's cache would have served it.
  Products read both operands and write their result once; that tiles read them again is counted on neither side.
- A chain of elementwise operations is one pass, as ``mx.compile`` fuses it: it reads what enters, writes what leaves. A
  result that something outside the chain reads as well is written, and read from there. Reductions, sorts, gathers,
  joins and products are operations of their own.
- A norm with a float32 weight is three passes in bfloat16, for MLX widens its input first: widen, norm, round. Rounding
  and widening are part of what stands before or behind them, where nothing else reads what lies between.
- Copies that MLX makes inside an operation, of rows that are not in order, are not counted; the plain norms of heads
  make some.
- Operations are multiply-adds of products, each counted as two. All else is bound by bytes and not counted, nor are
  norm weights and tables of RoPE, which are a few KB.

``work_layers`` has the parts inside a layer, ``work_ends`` those before and behind the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig, TextConfig
from ..formats.encoding import Encoding, dense, grouped
from ..tensors import VISION, Tensor, tensor_table

SelfConditioning = Literal["dense", "survivors"]
SURVIVORS = 64.0  # per row and step, on average: an assumption, for nobody has counted them on the 26B model
SLICE_ELEMENTS = 8 * 2**20  # of the plain version: most elements of a float32 temporary over the vocabulary
SLICE_BYTES = 256 * 2**20  # with kernels: most bytes of a slice's logits
LEAST_SLOTS = 64  # of a layer's buffer for the prefix
READ_ONCE = 4096  # keys, up to which MLX's softmax reads its scores once; beyond, twice
FORMATS = ("bf16", "4bit", "8bit", "mxfp4", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, and operations."""

    nbytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.operations + other.operations)

    def times(self, count: float) -> Cost:
        return Cost(self.nbytes * count, self.operations * count)


@dataclass(frozen=True)
class Load:
    """One step of a model.

    Args:
        encodings: how matrices are stored, by name; the others are dense in the dtype of activations.
        prompt: tokens that every row holds.
        width: bytes of an activation.
        survivors: entries per row that ``self_conditioning="survivors"`` gathers, on average.
        kept: canvas positions whose logits are made, ``None`` for all.
        wide: let the plain version, too, take slices of the vocabulary as large as kernels do. It does not, for its
            float32 temporaries would be 1.3 GB; but so the gain is seen apart from how often the table is read.
    """

    config: ModelConfig
    encodings: Mapping[str, Encoding]
    prompt: int = 4096
    batch: int = 1
    width: int = 2
    self_conditioning: SelfConditioning = "dense"
    survivors: float = SURVIVORS
    kept: int | None = None
    wide: bool = False

    @property
    def text(self) -> TextConfig:
        return self.config.text

    @property
    def rows(self) -> int:
        """Tokens of a step."""
        return self.batch * self.config.canvas_length

    @property
    def read_rows(self) -> int:
        """Tokens whose logits are made."""
        length = self.config.canvas_length
        return self.batch * (length if self.kept is None else min(self.kept, length))

    def stored(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix."""
        encoding = self.encodings.get(name)
        return encoding.nbytes(shape) if encoding else dense("float32" if self.width == 4 else "bfloat16").nbytes(shape)

    def slices(self, fused: bool) -> int:
        """How often the table is read for one product with all rows."""
        vocab = self.text.vocab_size
        size = max(1, SLICE_BYTES // (vocab * self.width) if fused or self.wide else SLICE_ELEMENTS // vocab)
        return -(-self.read_rows // size)


def formats(config: ModelConfig, name: str) -> dict[str, Encoding]:
    """Encodings of a published kind of checkpoint: its format for the experts, affine 8-bit for every other matrix.

    So mlx-community stores them (mlx-vlm's default predicate); ``bf16`` is dense. Groups of 64 where rows allow it.
    """
    if name == "bf16":
        return {}
    rest = grouped("affine", bits=8, group_size=64)
    kinds = {"4bit": grouped("affine", bits=4, group_size=64), "8bit": rest, "mxfp4": grouped("mxfp4")}
    kinds |= {"mxfp8": grouped("mxfp8"), "nvfp4": grouped("nvfp4")}
    found = {}
    for row in matrices(config).values():
        encoding = kinds[name] if row.role == "experts" else rest
        if encoding.fits(row.shape):
            found[row.name] = encoding
    return found


def matrices(config: ModelConfig) -> dict[str, Tensor]:
    """The text model's tensors of two axes and more."""
    return {name: row for name, row in tensor_table(config).items() if row.role not in VISION and len(row.shape) > 1}


# ---- the units that parts are made of


def product(load: Load, name: str, shape: tuple[int, int], rows: float) -> Cost:
    """``rows`` rows times a matrix [out, in]."""
    out, width = shape
    return Cost(load.stored(name, shape) + rows * (out + width) * load.width, 2 * rows * out * width)


def passes(elements: float, nbytes: float) -> Cost:
    """Work on ``elements`` elements, ``nbytes`` read and written for each."""
    return Cost(elements * nbytes)


def widen(load: Load) -> int:
    """Bytes per element of a pass that widens to float32, or rounds from it; nothing where all is float32."""
    return 0 if load.width == 4 else load.width + 4


def norm(load: Load) -> int:
    """Bytes per element of a plain norm with a float32 weight: widened, normed, rounded."""
    return 2 * 4 + 2 * widen(load)


def rounded_up(slots: int) -> int:
    """Of a prefix, as buffers and the shapes of a compiled step have them: one of four sizes per doubling."""
    step = max(LEAST_SLOTS, (1 << slots.bit_length()) // 8)
    return -(-slots // step) * step


def touched(text: TextConfig, rows: int) -> float:
    """The expected share of experts that at least one of ``rows`` tokens visits, when all are equally likely."""
    return 1 - (1 - text.top_k_experts / text.num_experts) ** rows
