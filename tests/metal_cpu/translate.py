"""The text of a Metal function as C++, by few changes that leave its lines where they are."""

from __future__ import annotations

import re

MOST = "t.most_threads.x * t.most_threads.y * t.most_threads.z"  # threads of a threadgroup that is not cut off
# what MLX passes a kernel on when its source names it, and where the engine has it
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", f"({MOST} + 3) / 4"),
    "dispatch_simdgroups_per_threadgroup": ("uint", f"({MOST} + 31) / 32"),
    "dispatch_threads_per_threadgroup": ("uint3", "t.most_threads"),
    "grid_origin": ("uint3", "uint3(0)"),
    "grid_size": ("uint3", "t.grid"),
    "quadgroup_index_in_threadgroup": ("uint", "t.index / 4"),
    "quadgroups_per_threadgroup": ("uint", "(t.threads.x * t.threads.y * t.threads.z + 3) / 4"),
    "simdgroup_index_in_threadgroup": ("uint", "t.simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "t.simdgroups"),
    "thread_execution_width": ("uint", "32"),
    "thread_index_in_quadgroup": ("uint", "t.index % 4"),
    "thread_index_in_simdgroup": ("uint", "t.lane"),
    "thread_index_in_threadgroup": ("uint", "t.index"),
    "thread_position_in_grid": ("uint3", "t.in_grid"),
    "thread_position_in_threadgroup": ("uint3", "t.in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "t.group"),
    "threadgroups_per_grid": ("uint3", "t.threadgroups"),
    "threads_per_grid": ("uint3", "t.grid"),
    "threads_per_simdgroup": ("uint", "32"),
    "threads_per_threadgroup": ("uint3", "t.threads"),
}

SPACES = "device|constant|threadgroup|thread"
# types that a text may use without declaring them
TYPES = (
    r"auto|bool|void|(?:u?(?:char|short|int|long)|b?float|half)[234]?|u?int(?:8|16|32|64)_t|b?float16_t|size_t|ptrdiff_t|"
    r"vec|atomic|atomic_(?:int|uint|float|bool)|simdgroup_\w+8x8|simdgroup_matrix"
)


class NotMetal(RuntimeError):
    """The text is not Metal, or none that the runner knows."""


def signature(text: str) -> tuple[tuple[str, ...], str]:
    """The names of the kernel's buffers, and C++ that calls it with what lies behind ``void**``."""
    found = re.search(r"^\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.S | re.M)
    if not found:
        raise NotMetal(f"no kernel in the text that MLX generated:\n{text}")
    buffers: list[str] = []
    values = []
    for parameter in found[2].split(",\n"):
        if buffer := re.fullmatch(r"\s*(.*?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]", parameter):
            if int(buffer[4]) != len(buffers):
                raise NotMetal(f"buffers out of order: {parameter}")
            values.append(f"{'*' if buffer[2] == '&' else ''}({buffer[1]}*)b[{len(buffers)}]")
            buffers.append(buffer[3])
        elif attribute := re.fullmatch(r"\s*(\w+) (\w+) \[\[(\w+)\]\]", parameter):
            known = ATTRIBUTES.get(attribute[3])
            if known is None or known[0] != attribute[1]:
                raise NotMetal(f"unknown attribute: {parameter}")
            values.append(known[1])
        else:
            raise NotMetal(f"unknown argument: {parameter}")
    instance = re.search(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*)\) ", text, re.M)
    call = f"{instance[1] if instance else found[1]}({', '.join(values)});"
    return tuple(buffers), f'extern "C" void metal_cpu_body(void** b, const metal_cpu::Thread& t) {{ {call} }}\n'


def translated(text: str) -> str:
    """As C++. Lines stay where they are, so that the compiler's and the engine's messages name those of ``text``."""
    text = without_comments(text)
    # the instance is made by the call instead: clang takes no attributes at this place
    text = re.sub(r"^template \[\[host_name.*", "", text, flags=re.M)
    # a literal without a suffix is a float in Metal
    number = r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)"
    if long := re.search(number + r"[lL]\b", text):
        raise NotMetal(f"Metal has no double, nor anything longer: {long[0]}")
    text = re.sub(number + r"(?![\w.])", r"\1f", text)
    check_pointers(text)
    return f'#include <metal_stdlib>\n#line 1 "kernel.metal"\n{checked_casts(shared_variables(text))}\n'


def check_pointers(text: str) -> None:
    """Metal wants the address space of every pointer and reference said; in C++ one of a thread's needs none."""
    named = re.findall(r"\b(?:struct|class|union|typename|using)(?:\s+alignas\([^{}]*?\))?\s+(\w+)", text)
    kind = rf"(?<![\w.>])(?:{'|'.join([TYPES, *named])})\b(?:<[\w:<>, *]*>)?"
    words, star = r"((?:\b\w+\s+)*)", r"((?:\s+\w+)*)\s*(?:[*&]|\(\s*&)"
    for found in re.finditer(words + kind + star + r"[^;,(){}]*", text):
        if not re.search(rf"\b({SPACES})\b", found[1] + found[2]):
            raise NotMetal(f"a pointer or reference without address space: {found[0]!r}")


def checked_casts(text: str) -> str:
    """``(device T*)p`` becomes a function that checks that p points to the same space; C++ takes any: msl/spaces.h."""
    cast = rf"\(\s*([^(){{}};]*\b(?:{SPACES})\b[^(){{}};]*\*)\s*\)"
    for found in reversed(list(re.finditer(cast, text))):
        if operand := re.compile(r"\s*[&*]*(?=[\w(])[\w:]*").match(text, found.end()):
            end = operand.end()
            while follows := re.compile(r"\s*(?:(?=[(\[])|(?:\.|->)\w+)").match(text, end):
                end = behind_bracket(text, follows.end())
            text = f"{text[: found.start()]}(metal_cpu::cast<{found[1]}>({text[found.end() : end]})){text[end:]}"
    return text


def behind_bracket(text: str, at: int) -> int:
    """The place behind the bracket that opens at ``at`` and those in it; ``at`` if none does."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] in "([") - (text[place] in ")]")
        if depth == 0:
            return place + 1 if place > at else at
    return at


def shared_variables(text: str) -> str:
    """Variables of a threadgroup become references to memory that the engine guards.

    One per declaration: ``threadgroup T name[N][M];``. Any other way to declare them is refused, as it would silently
    give each thread a variable of its own.
    """
    count = 0

    def replace(found: re.Match[str]) -> str:
        nonlocal count
        kind, name, sizes = found.groups()
        count += 1
        return (
            f"typedef metal_cpu::shared<{kind}> {name}_type{sizes}; static void* {name}_memory; "
            f"static ulong {name}_number; {name}_type& {name} = metal_cpu::threadgroup_variable<{name}_type>"
            f"({count - 1}, {name}_memory, {name}_number);"
        )

    declaration = r"(?<![\w*&(,]) ?\bthreadgroup\s+([\w:]+(?:<[\w:<>, ]*>)?)\s+(\w+)\s*((?:\[[^;\]]*\]\s*)*);"
    rest = re.sub(declaration, "", text)
    if stray := re.search(r"\bthreadgroup\b(?![^;,(){}=]*[*&])[^;{}]*", rest):
        raise NotMetal(f"a threadgroup variable stands alone, without initial value: {stray[0]!r}")
    return re.sub(declaration, replace, text)


def without_comments(text: str) -> str:
    """Comments replaced by as many lines."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda found: "\n" * found[0].count("\n") or " ", text, flags=re.S)
