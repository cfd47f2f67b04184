"""The demo's tasks: short prompts whose one right answer a program knows.

One prompt in sixteen, by the CRC-32 of its text, is held out: training never sees it, evaluation sees nothing else.
The rhymes are the exception, four texts learnt by heart to show answers that run over several canvases.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import sudoku

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = (
    "apple banana cherry orange lemon planet rocket garden window yellow purple silver table chair river mountain "
    "forest ocean island winter summer spring autumn coffee sugar butter bread cheese pepper tomato potato carrot "
    "music piano guitar violin school teacher student letter number puzzle circle square triangle dragon castle "
    "knight wizard monkey tiger rabbit turtle kitten puppy horse eagle parrot salmon doctor nurse driver farmer "
    "baker singer dancer painter hello world happy sunny cloudy rainy windy stormy quiet noisy clever brave gentle "
    "bright simple random matrix vector"
).split()
NAMES = "bob ann tom eve max zoe sam kim leo mia".split()
KEYS = "age id size x y n qty day".split()
RHYMES = {
    "twinkle": "Twinkle, twinkle, little star,\nHow I wonder what you are!\n"
    "Up above the world so high,\nLike a diamond in the sky.",
    "mary": "Mary had a little lamb,\nIts fleece was white as snow;\n"
    "And everywhere that Mary went\nThe lamb was sure to go.",
    "jack": "Jack and Jill went up the hill\nTo fetch a pail of water.\n"
    "Jack fell down and broke his crown,\nAnd Jill came tumbling after.",
    "humpty": "Humpty Dumpty sat on a wall,\nHumpty Dumpty had a great fall.",
}


@dataclass(frozen=True)
class Example:
    """``history`` holds the (prompt, answer) turns before."""

    task: str
    prompt: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = [text for turn in self.history for text in turn] + [self.prompt]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def word(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    letters = ["bcdfghklmnprstvw", "aeiou"]
    return "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(3, 8)))


def spoken(number: int) -> str:
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + ("-" + ONES[number % 10] if number % 10 else "")
    return ONES[number // 100] + " hundred" + (" " + spoken(number % 100) if number % 100 else "")


def add(rng):
    top = 10 ** rng.choice([1, 2, 2])
    a, b = rng.randrange(top), rng.randrange(top)
    return f"{a}+{b}=", str(a + b)


def sort(rng):
    text = word(rng)
    return f"sort {text}", "".join(sorted(text))


def reverse(rng):
    text = word(rng)
    return f"reverse {text}", text[::-1]


def upper(rng):
    text = word(rng)
    return f"upper {text}", text.upper()


def words(rng):
    number = rng.randrange(1000)
    return f"words {number}", spoken(number)


def json_object(rng):
    keys, name = rng.sample(KEYS, rng.choice([1, 2])), rng.choice(NAMES)
    values = [rng.randrange(100) for _ in keys]
    prompt = f"json name={name}" + "".join(f" {k}={v}" for k, v in zip(keys, values, strict=True))
    return prompt, json.dumps({"name": name, **dict(zip(keys, values, strict=True))})


def table(rng):
    keys = rng.sample(KEYS, 2)
    values = [str(rng.randrange(100)) for _ in keys]
    prompt = "table " + " ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
    return prompt, "\n".join("|" + "|".join(row) + "|" for row in (keys, ["-", "-"], values))


def count_up(rng):
    first = rng.randrange(90)
    last = first + rng.randint(2, 8)
    return f"from {first} to {last}", " ".join(map(str, range(first, last + 1)))


def rhyme(rng):
    name = rng.choice(list(RHYMES))
    return f"recite {name}", RHYMES[name]


def sudoku_task(size: int, pool: str):
    def task(rng):
        question, answer = sudoku.variation(size, rng, pool)
        return "sudoku\n" + sudoku.draw(question), sudoku.draw(answer)

    return task


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": add,
    "sort": sort,
    "reverse": reverse,
    "upper": upper,
    "words": words,
    "json": json_object,
    "table": table,
    "range": count_up,
    "rhyme": rhyme,
    "sudoku4": sudoku_task(4, "held out"),
    "sudoku6": sudoku_task(6, "held out"),
}
DIALOG, TALK, TURN_TOKENS = "dialog", ("add", "sort", "upper", "words", "json", "range"), 10
NAMES_OF_TASKS = [*TASKS, DIALOG]
TRAINED = {f"sudoku{size}": sudoku_task(size, "training") for size in (4, 6)}


def held_out(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 16 == 0


def draw(task: str, rng: random.Random, *, held: bool) -> Example:
    """One example of ``task`` from the held-out side of the split, or from the training side."""
    if task == DIALOG:
        return dialog(rng, held=held)
    make = TASKS[task] if held else TRAINED.get(task, TASKS[task])
    while True:
        prompt, answer = make(rng)
        if task == "rhyme" or held_out(prompt) == held:
            return Example(task, prompt, answer)


def dialog(rng: random.Random, *, held: bool) -> Example:
    """A question after others and their answers: always longer than the sliding window of 64 tokens."""
    question = draw(rng.choice(TALK), rng, held=held)
    history: list[tuple[str, str]] = []
    while sum(len(p) + len(a) + TURN_TOKENS for p, a in history) + len(question.prompt) < 64:
        earlier = draw(rng.choice(TALK), rng, held=False)
        history.append((earlier.prompt, earlier.answer))
    return Example(DIALOG, question.prompt, question.answer, tuple(history))


def evaluation_set(count: int, seed: int = 2026) -> list[Example]:
    """``count`` held-out examples, the tasks in turn. A prompt comes again only when twenty draws found no new one:

    ``words`` and ``range`` have but a few dozen held-out prompts, asked again under another seed; the rhymes are four.
    """
    rng, seen, examples = random.Random(seed), set(), []
    while len(examples) < count:
        task = NAMES_OF_TASKS[len(examples) % len(NAMES_OF_TASKS)]
        for _ in range(20):
            example = draw(task, rng, held=True)
            if (example.prompt, example.history) not in seen:
                break
        seen.add((example.prompt, example.history))
        examples.append(example)
    return examples
