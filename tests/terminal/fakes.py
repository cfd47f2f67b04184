"""A terminal in memory, a tokenizer whose ids are code points, and events made by hand."""

from __future__ import annotations

import numpy as np
import pyte
from rich.console import Console

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.events import Block, Draft
from mlx_diffgemma.prompts.parse import CLOSE, OPEN
from mlx_diffgemma.prompts.processor import Processor
from mlx_diffgemma.terminal.live import LiveView
from tests.terminal.screen import new_screen

END, PAD, OPEN_ID, CLOSE_ID, BYTES = 2_000_000, 2_000_001, 2_000_002, 2_000_003, 3_000_000
NAMES = {END: "<turn|>", PAD: "<pad>", OPEN_ID: OPEN, CLOSE_ID: CLOSE}
C = 64


class CodePoints:
    """Ids are code points; ids from BYTES on are single bytes of UTF-8, as a byte fallback has them."""

    vocab_size = 4_000_000

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids, *, special: bool = False) -> str:
        data = b""
        for id in ids:
            if id in NAMES:
                data += NAMES[id].encode() if special else b""
            else:
                data += bytes([id - BYTES]) if id >= BYTES else chr(id).encode()
        return data.decode("utf-8", errors="replace")

    def id_of(self, token: str) -> int | None:
        return next((id for id, name in NAMES.items() if name == token), None)

    def token_of(self, id: int) -> str:
        return NAMES.get(id) or chr(id)


def processor() -> Processor:
    return Processor(CodePoints(), None, {}, GenerationConfig(eos_token_ids=(END,), pad_token_id=PAD, max_tokens=4096))


def spelled(content) -> list[int]:
    """Ids of a text, or of a list of texts and ids."""
    parts = [content] if isinstance(content, str) else content
    return [id for part in parts for id in (map(ord, part) if isinstance(part, str) else [part])]


def draft(content, accepted=True, confidence=1.0, block=0, step=1, text=None) -> Draft:
    """The end token and padding follow the content."""
    ids = [*spelled(content), END]
    length = max(len(ids), C)
    ids += [PAD] * (length - len(ids))
    flags = np.full(length, accepted) if isinstance(accepted, bool) else np.resize(np.array(accepted), length)
    sure = np.resize(np.asarray(confidence, np.float32), length)
    array = np.array(ids, np.int32)
    shown = content if text is None and isinstance(content, str) else text or ""
    return Draft(0, block, step, array, array, flags, np.zeros(length, np.float32), sure, shown)


def block(content, number=0, text=None) -> Block:
    ids = spelled(content)
    return Block(0, number, 3, np.array(ids, np.int32), tuple(ids), content if text is None else text)


class Terminal:
    """A file that is a terminal: keeps the raw text and plays it on a pyte screen."""

    encoding = "utf-8"

    def __init__(self, columns: int = 80, rows: int = 24):
        self.screen = new_screen(columns, rows)
        self.stream = pyte.Stream(self.screen)
        self.raw = ""

    def write(self, text: str) -> int:
        self.raw += text
        self.stream.feed(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    def view(self, **settings) -> LiveView:
        size = {"width": self.screen.columns, "height": self.screen.lines}
        console = Console(
            file=self, force_terminal=True, color_system="truecolor", legacy_windows=False, _environ={}, **size
        )
        shared = processor()
        return LiveView(shared, shared.generation.replace(**settings), console, clock=lambda: 0.0)
