"""An independent computation of the paper's loss, with plain Python floats and probabilities.

It shares nothing with the product: no torch, no log-softmax, no tensor indexing. Gradients are central differences.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

Vector = Sequence[float]


def softmax(logits: Vector) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def kl(p: Vector, q: Vector) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def js(p: Vector, q: Vector) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return kl(p, middle) / 2 + kl(q, middle) / 2


def restrict(p: Vector, keep: Sequence[int], tail: str) -> list[float]:
    inside = [p[i] for i in keep]
    if tail == "renormalize":
        return [value / math.fsum(inside) for value in inside]
    return [*inside, math.fsum(value for i, value in enumerate(p) if i not in set(keep))]


def top(p: Vector, k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda i: -p[i])[:k]


def divergence(s: Vector, t: Vector, kind: str, support: str = "full", k: int = 128, tail: str = "bucket") -> float:
    if support != "full" and k < len(s):
        keep = top(s if support == "student_topk" else t, k)
        s, t = restrict(s, keep, tail), restrict(t, keep, tail)
    return {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "js": js(s, t)}[kind]


def regimes(q_t: Vector, q_s: Vector, trim: float = 0.05) -> list[str]:
    """The four conditions on the probabilities of the sampled tokens of one batch."""
    gaps = [abs(math.log(a) - math.log(b)) for a, b in zip(q_t, q_s, strict=True)]
    by_gap = sorted(range(len(gaps)), key=lambda i: gaps[i])
    kept = by_gap[: len(gaps) - math.floor(Fraction(str(trim)) * len(gaps))]
    mean_gap, mean_t, mean_s = (math.fsum(values[i] for i in kept) / len(kept) for values in (gaps, q_t, q_s))
    names = []
    for gap, a, b in zip(gaps, q_t, q_s, strict=True):
        if gap < mean_gap:
            names.append("LH" if a + b >= mean_t + mean_s else "LL")
        else:
            names.append("HT" if a >= b else "HS")
    return names


def dopd_loss(
    student: Sequence[Sequence[Vector]],
    teacher_p: Sequence[Sequence[Vector]],
    student_p: Sequence[Sequence[Vector]],
    ids: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]],
    *,
    k: int,
    tail: str,
) -> float:
    """Eq. 11 on nested lists of logits [sequence][token][vocabulary], with the published weights."""
    places = [(b, n) for b, row in enumerate(mask) for n, kept in enumerate(row) if kept]
    probs = {
        name: {(b, n): softmax(logits[b][n]) for b, n in places}
        for name, logits in (("S", student), ("Tp", teacher_p), ("Sp", student_p))
    }
    names = regimes(
        [probs["Tp"][b, n][ids[b][n]] for b, n in places], [probs["Sp"][b, n][ids[b][n]] for b, n in places]
    )
    terms: dict[int, list[float]] = {}
    for (b, n), name in zip(places, names, strict=True):
        s, t, anchor = probs["S"][b, n], probs["Tp"][b, n], probs["Sp"][b, n]
        value = {
            "LH": lambda s=s, t=t: 0.6 * divergence(s, t, "reverse_kl", "student_topk", k, tail),
            "LL": lambda s=s, a=anchor: 0.3 * divergence(s, a, "reverse_kl", "student_topk", k, tail),
            "HT": lambda s=s, t=t: 1.0 * divergence(s, t, "js"),
            "HS": lambda s=s, a=anchor: 0.6 * divergence(s, a, "reverse_kl", "student_topk", k, tail),
        }[name]()
        terms.setdefault(b, []).append(value)
    return math.fsum(math.fsum(values) / len(values) for values in terms.values()) / len(terms)


def vanilla_loss(
    student: Sequence[Sequence[Vector]], teacher: Sequence[Sequence[Vector]], mask: Sequence[Sequence[int]]
) -> float:
    """Vanilla OPD on nested lists of logits: KL(student || plain teacher) of every scored token, weight 1."""
    means = []
    for s_row, t_row, kept in zip(student, teacher, mask, strict=True):
        values = [kl(softmax(s), softmax(t)) for s, t, keep in zip(s_row, t_row, kept, strict=True) if keep]
        if values:
            means.append(math.fsum(values) / len(values))
    return math.fsum(means) / len(means)


def central_differences(function: Callable[[list[float]], float], at: Vector, step: float = 1e-5) -> list[float]:
    """The gradient of a function of a list of floats, one coordinate at a time."""
    gradient = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i] += step
        down[i] -= step
        gradient.append((function(up) - function(down)) / (2 * step))
    return gradient
