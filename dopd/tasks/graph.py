"""Walks in a small directed graph: where exactly n steps lead, when most turnings are dead ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dopd.tasks.base import Example, check_range
from dopd.tasks.registry import register_task
from dopd.tasks.text import TextTask

_LETTERS = "abcdefghijklmnop"
_STEP = 2  # words per solution step: the edge that is taken


def _parse(prompt: str) -> tuple[set[tuple[str, str]], str, int]:
    words = prompt.split()
    edges, start, length = words[:-3], words[-2], int(words[-1])
    return {(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)}, start, length


@register_task
@final
@dataclass(frozen=True)
class GraphTask(TextTask):
    """The only walk of a given length from a given node, among turnings that end too early.

    Prompt: `C d A b B c A f ? A 3`, two words per edge in random order (a node is upper-case where an edge leaves it,
    lower-case where one arrives), then the start and the number of edges to walk. Solution: the edges of the walk,
    `A b B c C d`. Choosing at a fork needs a look ahead; following edges is easy. The goal is not in the prompt.

    Privileged text: `final_answer` is the last node (`exit d`); `hints_with_execution` the whole walk (`path b c d`);
    `hints_without_execution` where to go at each fork (`at b`), neither the steps between nor the end;
    `summarised_hint` one node half way (`via c`).

    `ood`: one step and one fork more than the knobs say.

    Args:
        seed: Chooses the stream of problems.
        path_length: Edges of the walk (2 to 7).
        num_forks: Nodes of the walk with a wrong turning (1 to `path_length - 1`).
        dead_end_depth: Edges behind a wrong turning, fewer where the walk itself would end earlier (1 to 3): how far
            one must look ahead. The walk and the dead ends, with what `ood` adds, must not need more than 16 nodes.
    """

    path_length: int = 4
    num_forks: int = 2
    dead_end_depth: int = 3

    name: ClassVar[str] = "graph"
    description: ClassVar[str] = "the only walk of n steps in a directed graph; the hint names the turns"

    def __post_init__(self) -> None:
        check_range("path_length", self.path_length, 2, 7, "Shorter walks have no fork.")
        check_range("num_forks", self.num_forks, 1, self.path_length - 1, "The last step cannot be a wrong turning.")
        check_range("dead_end_depth", self.dead_end_depth, 1, 3, "It counts edges.")
        nodes = self.path_length + 2 + (self.num_forks + 1) * self.dead_end_depth
        check_range("nodes (from the other knobs)", nodes, 1, len(_LETTERS), "Lower num_forks or dead_end_depth.")

    def vocabulary(self) -> tuple[str, ...]:
        return (*"0123456789", *_LETTERS, *_LETTERS.upper(), "?", "exit", "path", "at", "via")

    def completion_words(self, split: str = "test") -> int:
        return _STEP * (self.path_length + (split == "ood"))

    def _draw(self, rng: random.Random, split: str) -> Example:
        extra = split == "ood"
        length, num_forks = self.path_length + extra, self.num_forks + extra
        names = iter(rng.sample(_LETTERS, length + 1 + num_forks * self.dead_end_depth))
        walk = [next(names) for _ in range(length + 1)]
        edges = list(itertools.pairwise(walk))
        turns = []
        for position in sorted(rng.sample(range(length - 1), num_forks)):
            # A wrong turning after `position` steps must end before the walk does, or the walk is not the only one.
            depth = min(self.dead_end_depth, length - 1 - position)
            branch = [next(names) for _ in range(depth)]
            turns.append(walk[position + 1])
            edges += zip([walk[position], *branch], branch, strict=False)
        rng.shuffle(edges)
        return Example(
            prompt=" ".join([*(f"{a.upper()} {b}" for a, b in edges), "?", walk[0].upper(), str(length)]),
            solution=" ".join(f"{a.upper()} {b}" for a, b in itertools.pairwise(walk)),
            answer=walk[-1],
            privileged={
                "final_answer": f"exit {walk[-1]}",
                "hints_with_execution": " ".join(["path", *walk[1:]]),
                "hints_without_execution": " ".join(["at", *turns]),
                "summarised_hint": f"via {walk[(length + 1) // 2]}",
            },
            metadata={"path_length": length, "num_forks": num_forks, "num_edges": len(edges)},
        )

    def _canonical(self, prompt: str) -> str:
        edges, start, length = _parse(prompt)
        return f"{sorted(edges)} {start} {length}"

    def _is_correct(self, words: Sequence[str], prompt: str, answer: str) -> bool:
        edges, here, length = _parse(prompt)
        if len(words) != _STEP * length or words[-1] != answer:
            return False
        for edge in zip(words[::2], words[1::2], strict=True):
            if edge not in edges or edge[0] != here:
                return False
            here = edge[1].upper()
        return True

    def _near_misses(self, example: Example) -> dict[str, str]:
        words = example.solution.split()
        edges, start, _ = _parse(example.prompt)
        walk = set(zip(words[::2], words[1::2], strict=True))
        fork = min(i for i in range(0, len(words), 2) for a, b in edges - walk if a == words[i])
        wrong_turn = min(b for a, b in edges - walk if a == words[fork])
        wrong = {
            "stopped one step early": words[:-_STEP],
            "first step missing": words[_STEP:],
            "wrong last node": [*words[:-1], start.lower()],
            "edge that does not exist": [*words[:-2], start, words[-1]],
            "wrong turning": [*words[:fork], words[fork], wrong_turn, *words[fork + 2 :]],
            "wrong turning, then stopped": [*words[: fork + 1], wrong_turn],
            "walk backwards": [word for i in range(len(words) - 2, -1, -2) for word in words[i : i + 2]],
            "last step twice": [*words, *words[-2:]],
            "one step twice, one left out": [*words[:2], *words[:2], *words[4:]],
            "nodes without edges": [words[0].lower(), *words[1::2]],
            "case swapped": [word.swapcase() for word in words],
        }
        return {name: " ".join(text) for name, text in wrong.items()}

    def _secrets(self, example: Example) -> frozenset[str]:
        edges = _parse(example.prompt)[0]
        steps = example.solution.split()
        forks = {a for a, _ in edges if sum(b == a for b, _ in edges) > 1}
        return frozenset(b for a, b in zip(steps[::2], steps[1::2], strict=True) if a not in forks)
