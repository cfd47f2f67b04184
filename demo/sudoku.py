"""Sudoku of 4x4 (2x2 boxes) and 6x6 (2 rows x 3 columns): puzzles with exactly one solution, and their symmetries."""

from __future__ import annotations

import functools
import itertools
import random

Grid = list[list[int]]
BOX = {4: (2, 2), 6: (2, 3)}
BLANKS = {4: (4, 10), 6: (6, 18)}


def candidates(grid: Grid, row: int, column: int) -> list[int]:
    size = len(grid)
    height, width = BOX[size]
    top, left = row - row % height, column - column % width
    used = set(grid[row]) | {grid[r][column] for r in range(size)}
    used |= {grid[top + r][left + c] for r in range(height) for c in range(width)}
    return [v for v in range(1, size + 1) if v not in used]


def solved(size: int, rng: random.Random) -> Grid:
    grid = [[0] * size for _ in range(size)]

    def fill(cell: int) -> bool:
        if cell == size * size:
            return True
        row, column = divmod(cell, size)
        options = candidates(grid, row, column)
        rng.shuffle(options)
        for grid[row][column] in options:
            if fill(cell + 1):
                return True
        grid[row][column] = 0
        return False

    fill(0)
    return grid


def solutions(grid: Grid, limit: int = 2) -> int:
    """How many solutions the puzzle has, counted up to ``limit``; the tightest cell is tried first."""
    size = len(grid)
    open_cells = [(r, c) for r, c in itertools.product(range(size), repeat=2) if not grid[r][c]]
    if not open_cells:
        return 1
    row, column = min(open_cells, key=lambda cell: len(candidates(grid, *cell)))
    count = 0
    for value in candidates(grid, row, column):
        grid[row][column] = value
        count += solutions(grid, limit - count)
        if count >= limit:
            break
    grid[row][column] = 0
    return count


def puzzle(size: int, rng: random.Random) -> tuple[Grid, Grid]:
    """A puzzle (0 = blank) and its only solution."""
    answer = solved(size, rng)
    question = [list(row) for row in answer]
    cells = list(itertools.product(range(size), repeat=2))
    rng.shuffle(cells)
    wanted = rng.randint(*BLANKS[size])
    for row, column in cells:
        if not wanted:
            break
        question[row][column] = 0
        if solutions(question) > 1:
            question[row][column] = answer[row][column]
        else:
            wanted -= 1
    return question, answer


POOLS = {"training": 2000, "held out": 500}


@functools.cache
def pool(size: int, name: str) -> list[tuple[Grid, Grid]]:
    rng = random.Random(f"{name} {size}" if name != "training" else size)
    return [puzzle(size, rng) for _ in range(POOLS[name])]


def variation(size: int, rng: random.Random, name: str = "training") -> tuple[Grid, Grid]:
    """A puzzle of the pool under a random symmetry: digits relabelled, bands, rows, stacks and columns permuted.

    The held-out pool is another one, so that no evaluated puzzle is a trained one in disguise.
    """
    question, answer = rng.choice(pool(size, name))
    height, width = BOX[size]

    def order(groups: int, each: int) -> list[int]:
        return [g * each + i for g in rng.sample(range(groups), groups) for i in rng.sample(range(each), each)]

    rows, columns = order(size // height, height), order(size // width, width)
    label = [0, *rng.sample(range(1, size + 1), size)]

    def move(grid: Grid) -> Grid:
        return [[label[grid[r][c]] for c in columns] for r in rows]

    return move(question), move(answer)


def draw(grid: Grid) -> str:
    return "\n".join("".join(str(v) if v else "." for v in row) for row in grid)
