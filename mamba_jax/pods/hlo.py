"""What a compiled program runs, read from its text."""

import re
from collections.abc import Iterator, Sequence


def compiled_instructions(text: str) -> Iterator[tuple[str, int]]:
    """The instructions that a compiled program runs one after the other, and how often each of them runs.

    Args:
        text: of the program, from `Compiled.as_text`; loops count up to the largest number in their condition, and what
            runs on another unit of the chip counts like the rest.
    """
    bodies, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in bodies[name]:
            yield line, times
            if offloaded := re.search(r"call-start\(.*called_computations=\{%([^\s,}]+)", line):
                yield from walk(offloaded[1], times)
            if loop := re.search(r" while\((%\S+?)\).*condition=%(\S+?), body=%(\S+?)[,\s]", line + " "):
                yield from walk(loop[3], times * _turns("\n".join(bodies[loop[2]]), loop[1], bodies[name]))

    yield from walk(entry, 1)


def _turns(condition: str, start: str, lines: Sequence[str]) -> int:
    """How often a loop runs that counts in steps of one.

    Args:
        condition: text of its condition.
        start: name of the tuple of values that it starts from.
        lines: that the loop stands among; the compiler takes the first turn of some loops out, and counts from 1.
    """
    bounds = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
    counter = re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", condition)
    if not bounds or counter is None:
        return 1
    defined = dict(re.findall(r"^ *(%\S+) = (.*)$", "\n".join(lines), re.MULTILINE))
    values = re.search(r" tuple\((.*?)\)", re.sub(r"/\*.*?\*/", "", defined.get(start, "")))
    value = defined.get(values[1].split(", ")[int(counter[1])], "") if values is not None else ""
    while copied := re.search(r" copy\((%\S+?)\)", value):
        value = defined.get(copied[1], "")
    first = re.search(r"[su]32\[\]\S* constant\((\d+)\)", value)
    return max(map(int, bounds)) - (0 if first is None else int(first[1]))


def fused_instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """The instructions inside the fusions that a compiled program runs: name of the fusion, instruction, how often.

    Args:
        text: as of `compiled_instructions`.
    """
    bodies, _ = _computations(text)

    def inside(line: str, times: int) -> Iterator[tuple[str, str, int]]:
        if fusion := re.search(r" fusion\(.*calls=%([^\s,}]+)", line):
            for inner in bodies[fusion[1]]:
                yield fusion[1], inner, times
                yield from inside(inner, times)

    for line, times in compiled_instructions(text):
        yield from inside(line, times)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation of a compiled program, by name, and the name of the one that starts it."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry
