"""``make demo``: the packaged checkpoint answers prompts it has never seen; a program checks every answer.

On a terminal each draft is drawn while it is denoised: text in the ordinary colour was accepted in that step, violet
text returned to noise and shows the model's present guess. Exit status 1 if fewer than three quarters are right.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from tasks import NAMES_OF_TASKS, Example, draw

from mlx_diffgemma import Draft, Finished, UserError, load, stream_generate
from mlx_diffgemma.backend import CHOICES, choose
from mlx_diffgemma.errors import BackendError
from mlx_diffgemma.events import Block
from mlx_diffgemma.prompts.processor import Processor
from mlx_diffgemma.terminal import shade
from mlx_diffgemma.terminal.live import live_console
from mlx_diffgemma.terminal.painter import Painter
from mlx_diffgemma.terminal.text import fold, harmless, one_line

AGAIN = ("add", "sort", "range")  # asked a second time
SEED = 2026
PASS = 0.75
INTRODUCTION = """\
The demo checkpoint (4 MB, canvases of 48 characters) answers {count} prompts, backend {backend}.
It was trained on their like, never on these; only the rhymes it knows by heart.
A program checks every answer.
"""
MARK, TASK, PROMPT = 2, 9, 28  # columns
FAINT, RIGHT, WRONG = Style(dim=True), Style(color="green", bold=True), Style(color="red", bold=True)


@dataclass(frozen=True)
class Outcome:
    example: Example
    result: Finished

    @property
    def right(self) -> bool:
        return self.result.text == self.example.answer


def examples() -> list[Example]:
    """One held-out prompt of each task, and a few more; the rhyme is one that runs over several canvases."""
    rng, order, chosen = random.Random(SEED), NAMES_OF_TASKS, {}
    for task in (*NAMES_OF_TASKS, *AGAIN):
        example = draw(task, rng, held=True)
        while example.prompt in chosen or (task == "rhyme" and example.answer.count("\n") < 3):
            example = draw(task, rng, held=True)
        chosen[example.prompt] = example
    return sorted(chosen.values(), key=lambda example: order.index(example.task))


class Board:
    """One line, or several, per prompt: mark, task, prompt, answer; the line in progress is drawn in place."""

    def __init__(self, processor: Processor, console: Console):
        self.painter, self.console = Painter(console), console
        self.speller, self.shades = shade.Speller(processor), shade.ladder()
        self.text = ""

    def ask(self, example: Example) -> None:
        self.painter.draw(self.rows(Text("○", FAINT), example, []))

    def show(self, example: Example, event: Draft | Block | Finished) -> None:
        if isinstance(event, Block):
            self.text += event.text
        if isinstance(event, Draft):
            ids = event.argmax.tolist()
            pieces, _ = self.speller.pieces(ids[: self.speller.visible(ids)], draft=event)
            drawn = [(harmless(self.text), shade.PLAIN), *shade.runs(pieces, self.shades)]
            self.painter.draw(self.rows(Text("○", FAINT), example, fold(drawn, self.room())))

    def settle(self, outcome: Outcome) -> None:
        mark = Text("✓", RIGHT) if outcome.right else Text("✗", WRONG)
        answer = fold([(harmless(outcome.result.text), shade.PLAIN)], self.room())
        figure = cost(outcome.result)
        if answer[-1].cell_len + len(figure) + 3 > self.room():
            answer.append(Text(figure, FAINT))
        else:
            answer[-1].append("   " + figure, FAINT)
        if not outcome.right:
            answer += fold([("expected\n" + outcome.example.answer, FAINT)], self.room())
        self.painter.draw([], Text("\n").join(self.rows(mark, outcome.example, answer)))
        self.text = ""

    def room(self) -> int:
        return max(self.console.width - MARK - TASK - PROMPT - 2, 8)

    def rows(self, mark: Text, example: Example, answer: list[Text]) -> list[Text]:
        """Prompt and answer side by side."""
        earlier = "… " if example.history else ""
        prompt = fold([(earlier + example.prompt.removeprefix("sudoku\n"), FAINT)], PROMPT)  # grid beside grid
        rows = []
        for i in range(max(len(prompt), len(answer))):
            row = Text().append(mark if i == 0 else " ").append(" " + (example.task if i == 0 else "").ljust(TASK))
            row.append(prompt[i] if i < len(prompt) else Text())
            if i < len(answer) and answer[i].plain:
                row.append(" " * (MARK + TASK + PROMPT + 2 - row.cell_len)).append(answer[i])
            rows.append(row)
        return rows

    def close(self) -> None:
        self.painter.close()


def cost(result: Finished) -> str:
    steps = result.stats.steps_per_block
    return "+".join(map(str, steps)) + (" step" if steps == (1,) else " steps")


def plain(outcome: Outcome) -> str:
    """The line of a prompt where nothing can be drawn."""
    example, result = outcome.example, outcome.result
    expected = "" if outcome.right else f", expected {one_line(example.answer)}"
    head = f"{'right' if outcome.right else 'WRONG'}  {example.task:<8} {one_line(example.prompt)} -> "
    return f"{head}{one_line(result.text)} ({cost(result)}{expected})"


def play(model, processor: Processor, board: Board | None) -> Iterator[Outcome]:
    for number, example in enumerate(examples()):
        if board is not None:
            board.ask(example)
        for event in stream_generate(model, processor, example.messages, seed=SEED + number):
            if board is not None:
                board.show(example, event)
            if isinstance(event, Finished):
                outcome = Outcome(example, event)
                if board is not None:
                    board.settle(outcome)
                else:
                    print(plain(outcome), flush=True)
                yield outcome


def summary(outcomes: list[Outcome], seconds: float, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("task")
    for name in ("right", "canvases", "steps per canvas"):
        table.add_column(name, justify="right")
    for task in [*NAMES_OF_TASKS, None]:
        chosen = [o for o in outcomes if task in (None, o.example.task)]
        canvases = sum(o.result.stats.blocks for o in chosen)
        steps = sum(o.result.stats.forwards for o in chosen)
        right = f"{sum(o.right for o in chosen)} of {len(chosen)}"
        figures = (task or "all", right, str(canvases), f"{steps / canvases:.1f}")
        table.add_row(*figures, style="" if task else "bold")
    console.print(table)
    steps, tokens = sum(o.result.stats.forwards for o in outcomes), sum(len(o.result.tokens) for o in outcomes)
    console.print(f"\n{tokens} tokens in {steps} steps, {seconds:.1f} s. One token at a time takes a step for each.")


def backend(name: str) -> str:
    """``auto`` as everywhere; where neither MLX nor PyTorch is installed, the NumPy reference."""
    try:
        return choose(name).name
    except BackendError:
        if name != "auto":
            raise
        return "reference"


def main() -> int:
    parse = argparse.ArgumentParser(description="Answer held-out prompts with the packaged demo checkpoint.")
    parse.add_argument("--backend", default="auto", help=f"auto (default), {', '.join(CHOICES)}")
    options = parse.parse_args()
    console = Console(highlight=False)
    try:
        name = backend(options.backend)
        console.print(INTRODUCTION.format(count=len(examples()), backend=name), soft_wrap=True)
        model, processor = load("demo", backend=name)
    except UserError as error:
        print(f"demo/run.py: {one_line(str(error))}", file=sys.stderr)
        return 2
    drawing = live_console(sys.stdout)
    board = Board(processor, drawing) if drawing is not None else None
    start = time.perf_counter()
    try:
        outcomes = list(play(model, processor, board))
    except KeyboardInterrupt:
        return 130
    finally:
        if board is not None:
            board.close()
    console.print()
    summary(outcomes, time.perf_counter() - start, console)
    return 0 if sum(o.right for o in outcomes) >= PASS * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
