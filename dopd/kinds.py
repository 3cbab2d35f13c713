"""Which divergences there are: those of `dopd.divergences`, and those that a user registers."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dopd.errors import ConfigError, first_line
from dopd.registry import Registry, place_of

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probs of student and target over outcomes: (..., K) -> (...)
AnyDivergence = TypeVar("AnyDivergence", bound=Divergence)

POLICY_GRADIENT = "policy_gradient"  # a function of a signal, not of two distributions
LIKELIHOOD = "nll"  # -log S(y) of the token that stands in the text
OF_THE_TOKEN = (POLICY_GRADIENT, LIKELIHOOD)  # no function of two distributions
DIVERGENCES: Registry[Divergence] = Registry(
    "divergence", lambda name, function: register_divergence(name)(function), OF_THE_TOKEN
)
WITHOUT_TARGET = set(OF_THE_TOKEN)


def register_divergence(name: str, *, reads_target: bool = True) -> Callable[[AnyDivergence], AnyDivergence]:
    """Register a divergence: the decorated function is what `divergence: NAME` means in a rule of a table.

    The function gets log-probabilities of the student and of the target over one list of outcomes, each (..., K): the
    whole vocabulary, or the K tokens of a top-k support, with one outcome more for the remaining mass where the rule's
    `tail` has one. It returns (...), nats. An outcome that cannot happen has -inf, or a very low number. The gradient
    by the student's log-probabilities is autograd's, taken a chunk of tokens at a time.

    Args:
        name (`str`): the name.
        reads_target (`bool`): whether it compares with a target, so that a rule names a `source`.

    Raises:
        ConfigError: a name that other code has.
    """

    def register(function: AnyDivergence) -> AnyDivergence:
        DIVERGENCES.register(name, function, function)
        if not reads_target:
            WITHOUT_TARGET.add(name)
        return function

    return register


def check_divergence(field: str, kind: object) -> str:
    """The name of a divergence, which is tried on two small distributions the first time it is named.

    Raises:
        ConfigError: there is none of that name, or its function does not return what it should.
    """
    name = DIVERGENCES.resolve(kind, field)
    problem = "" if name in OF_THE_TOKEN else _problem(DIVERGENCES[name])
    if problem:
        raise ConfigError(
            f"{field} (={kind!r}), {place_of(DIVERGENCES[name])}, {problem}. It takes the log-probabilities of the "
            "student and of the target, each (M, K), and returns (M,), nats, with a gradient by the student's"
        )
    return name


@functools.cache
def _problem(function: Divergence) -> str:
    """What is wrong with a function as a divergence, or `""`."""
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64, device="cpu")
    with torch.inference_mode(False), torch.enable_grad():
        log_s, log_t = probabilities.log().requires_grad_(), probabilities.flip(0).log()
        try:
            value = function(log_s, log_t)
        except Exception as error:
            return f"raises {type(error).__name__}: {first_line(error)}"
        if not isinstance(value, Tensor) or value.shape != (2,) or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            return f"returns {got} for log-probabilities (2, 3)"
        gradient = torch.autograd.grad(value.sum(), log_s, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        return "has no gradient by its first argument"
    finite = bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())
    return "" if finite else "is not finite, or its gradient, for distributions without a zero"
