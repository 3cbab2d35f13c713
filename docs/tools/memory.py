"""Computes the table of memory in `docs/how-to/one-gpu.md`: what each part of a training takes, by counting bytes.

python docs/tools/memory.py              # prints the table
"""

from dataclasses import dataclass

GIB = 2**30
# Of the recipe on the page: completions at a time, tokens of the longest prompt and of an answer, LoRA's rank.
BATCH, PROMPT, ANSWER, RANK = 8, 512, 1024, 16
LOSS = 1.0  # GiB: `GPU_TILE_BYTES`
CONTEXT = 1.0  # GiB: what CUDA and its libraries keep


@dataclass(frozen=True)
class Model:
    """Sizes of a Qwen3 model, from its published configuration."""

    name: str
    parameters: float  # billions
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 128

    @property
    def adapter(self) -> int:
        """Parameters of LoRA on every linear layer: rank x (inputs + outputs) of each."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return self.layers * RANK * (attention + 3 * (self.hidden + self.intermediate))


QWEN3 = {
    "0.6B": Model("Qwen3-0.6B", 0.60, 1024, 3072, 28, 16, 8),
    "1.7B": Model("Qwen3-1.7B", 1.72, 2048, 6144, 28, 16, 8),
    "4B": Model("Qwen3-4B", 4.02, 2560, 9728, 36, 32, 8),
    "8B": Model("Qwen3-8B", 8.19, 4096, 12288, 36, 32, 8),
}
ROWS = (("0.6B", "4B", False), ("1.7B", "4B", True), ("1.7B", "8B", True), ("4B", "8B", True), ("1.7B", "8B", False))


def parts(student: Model, teacher: Model, *, lora: bool) -> list[float]:
    """GiB of: the student's weights with gradients and AdamW, the teacher, activations or rollouts, the rest.

    Weights that train take 16 bytes each (float32: weight, gradient, two moments), others 2. Activations are those of
    checkpointing, one state for each layer and token in bfloat16, and of one layer computed anew, counted as 20 states
    of its width and 4 of its inner one. Rollouts keep keys and values instead, and the larger of the two counts.
    """
    tokens = BATCH * (PROMPT + ANSWER)
    billions = student.parameters * 1e9
    trained = 2 * billions + 16 * student.adapter if lora else 16 * billions
    states = 2 * tokens * (student.layers * student.hidden + 20 * student.hidden + 4 * student.intermediate)
    cache = 2 * 2 * tokens * student.layers * student.kv_heads * student.head_size
    # The head's gradient, in float32, where the head trains.
    head = 0.0 if lora else 4 * 151_936 * student.hidden / GIB
    return [trained / GIB, 2e9 * teacher.parameters / GIB, max(states, cache) / GIB, LOSS + CONTEXT + head]


def table() -> str:
    lines = [
        "| student | teacher | trained | student, its gradients and AdamW | teacher | activations or rollouts "
        "| loss, CUDA | together | fits in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for small, large, lora in ROWS:
        student, teacher = QWEN3[small], QWEN3[large]
        sizes = parts(student, teacher, lora=lora)
        whole = sum(sizes)
        fits = next((f"{size} GB" for size in (24, 48, 80) if whole < 0.9 * size * 1e9 / GIB), "more")
        what = f"LoRA, rank {RANK}" if lora else "all weights"
        cells = [student.name, teacher.name, what, *(f"{size:.1f}" for size in sizes), f"**{whole:.1f}**", fits]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
