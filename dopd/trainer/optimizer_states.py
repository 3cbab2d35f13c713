"""What optimizers keep beside the weights, in memory and in checkpoints."""

# Numbers for each trained one, by a part of the optimizer's name; AdamW's two averages where nothing else is known.
# Adafactor keeps sums of rows and columns, which hardly count.
_NUMBERS = {
    "schedule_free_sgd": 1,
    "sgd": 0,
    "adafactor": 0,
    "lomo": 0,
    "lion": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "ademamix": 3,
}
_TWO_AVERAGES = 2
# Bytes of such a number; where the name says nothing it has the precision of the weights.
_BYTES = {"8bit": 1.0, "4bit": 0.5, "32bit": 4.0, "ademamix": 4.0}


def kept_bytes(optim: str, element: int) -> float:
    """Bytes that an optimizer keeps for each trained number, about.

    Args:
        optim (`str`): its name, as `optim` of a configuration has it.
        element (`int`): bytes of a trained number.
    """
    numbers = next((count for part, count in _NUMBERS.items() if part in optim), _TWO_AVERAGES)
    return numbers * next((size for part, size in _BYTES.items() if part in optim), float(element))
