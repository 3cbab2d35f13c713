"""The load-balancing loss of mixtures of experts, which a model computes itself and adds to a loss of its own."""

import logging
from typing import Any

import torch
from torch import Tensor

from dopd.adapters import without_adapters
from dopd.errors import ConfigError, ScoringError
from dopd.scoring import Balance, evaluation_mode, left_padded, view_hidden_states
from dopd.trainer.host import HostTrainer

logger = logging.getLogger(__name__)


def balance_coefficient(trainer: HostTrainer) -> float:
    """What the auxiliary loss is multiplied with; 0 where there is none.

    As transformers has it: a checkpoint asks for it with `output_router_logits`, and says `router_aux_loss_coef`. A
    value given in the run's configuration counts in any case.

    Raises:
        ConfigError: a coefficient for a model that computes no such loss.
    """
    model, configured = trainer.unwrapped_student, trainer.args.router_aux_loss_coef
    # Weights that are split over processes cannot be tried here; the first step does.
    config = model.config.get_text_config()
    asked = bool(getattr(config, "output_router_logits", False))
    declared = float(getattr(config, "router_aux_loss_coef", None) or 0.0) if asked else 0.0
    coefficient = declared if configured is None else configured
    if not coefficient:
        return 0.0
    if not hasattr(config, "output_router_logits") or not (trainer.is_split or _computes_it(model)):
        name = type(without_adapters(model)).__name__
        if configured is not None:
            raise ConfigError(
                f"router_aux_loss_coef (={configured:g}): {name} computes no load-balancing loss of experts. Leave it "
                "out"
            )
        logger.warning(f"{name} asks for output_router_logits, but computes no load-balancing loss: none is added")
        return 0.0
    logger.warning(f"the load-balancing loss of the student's experts is added, times {coefficient:g}")
    return coefficient


def balanced(trainer: HostTrainer, loss: Tensor, balance: Balance) -> Tensor:
    """A micro-batch's share of a step's loss, with the load-balancing loss of its pass, which is logged (`aux_loss`).

    That one is a mean over the tokens of a pass, so over the passes of a step; `loss` is a sum over them.
    """
    if not balance.found:
        raise ScoringError("router_aux_loss_coef is set, but the student computed no load-balancing loss of experts")
    trainer.record({"aux_loss": trainer.accelerator.gather(balance.loss.detach()).mean().item()})
    passes = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    return loss + trainer.balance_coefficient * balance.loss / passes


@torch.no_grad()
def _computes_it(model: Any) -> bool:
    ids, view, balance = torch.tensor([[1, 2]], device=model.device), left_padded([[1]], 0, model.device), Balance()
    with evaluation_mode(model):
        view_hidden_states(model, view, ids, torch.ones_like(ids), balance=balance)
    return balance.found
