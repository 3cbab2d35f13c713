"""Targets built from a right and a wrong context."""

from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.tables import RoutingTable


@register_method(
    "opsd_contrast",
    "OPSD towards what a right context says beyond a wrong one",
    "arXiv 2606.11709 (its plug-in for OPSD)",
    "k / (k + 1) sum_v min(q(v) (log q(v) - log S(v)), c), q = P_right^(1 + a) P_wrong^(-a), normalised; "
    "k = KL(P_right || P_wrong)",
    departures="the wrong context is the row's contrast_context",
)
def opsd_contrast(*, strength: float = 0.5, clamp: float = 0.05, top_k: int = 100) -> RoutingTable:
    # Exponents that sum to 1 keep P_right's scale and divide by what P_wrong says as well; `contrast`, k / (k + 1), is
    # near 0 where both contexts say the same, so that only tokens on which they disagree are taught.
    rule = Rule(
        source={"privileged_student": 1.0 + strength, "contrast_student": -strength},
        divergence="forward_kl",
        clamp=clamp,
        support="target_topk",
        top_k=top_k,
        scale="contrast",
    )
    return RoutingTable(name="opsd_contrast", rules=(rule,), anchor="frozen")
