"""Targets built from a right and a wrong context."""

from typing import Any, Literal

from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import Count, NotNegative, Positive
from dopd.tables import RoutingTable


@register_method(
    "opsd_contrast",
    "OPSD towards what a right context says beyond a wrong one",
    "arXiv 2606.11709 (its plug-in for OPSD)",
    "k / (k + 1) sum_v min(q(v) (log q(v) - log S(v)), c) over the top K of P_right and one outcome for the rest; "
    "q ~ P_right^(1 + a) max(P_wrong, e^f)^(-a), k = KL(P_right || P_wrong)",
    departures="one wrong hint; no correct final answer after the hints; the gradient has the opposite sign at every "
    "outcome that the clamp bounds (arXiv 2609.38995), clamp null leaves it out, and no other form is published. Rows "
    "without both hints teach nothing, and count in the mean. Code read through a report",
)
def opsd_contrast(
    *,
    strength: NotNegative = 0.5,
    wrong_floor: float | None = -5.0,
    clamp: Positive | None = 0.05,
    top_k: Count = 100,
    hints: Literal["sibling", "column"] = "sibling",
) -> RoutingTable:
    """`wrong_floor`: f, nats; `top_k`: K (of the target: k keeps 100). DEPARTURE: `hints="column"`: right and wrong
    contexts are privileged_context and contrast_context of the row, not random rollouts of its prompt.
    """
    # Exponents that sum to 1 keep P_right's scale and divide by what P_wrong says as well, down to the floor: without
    # it tokens that P_wrong all but rules out would have the target. `contrast`, k / (k + 1), is near 0 where both
    # contexts say the same, so that only tokens on which they disagree are taught.
    wrong: Any = -strength if wrong_floor is None else {"power": -strength, "clip": [wrong_floor, None]}
    rule = Rule(
        source={"privileged_student": 1.0 + strength, "contrast_student": wrong},
        divergence="forward_kl",
        clamp=clamp,
        support="target_topk",
        top_k=top_k,
        outcomes_of="privileged_student",
        scale="contrast",
        select={"signal": "has_both", "above": 0.5},
    )
    return RoutingTable(
        name="opsd_contrast", rules=(rule,), anchor="frozen", context=hints, contrast=hints, siblings="random"
    )
