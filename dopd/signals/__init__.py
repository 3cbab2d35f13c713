"""Numbers of every token that are there before the loss: what rules select by, weigh by, and take as advantages."""

from dopd.signals.batch import SignalBatch
from dopd.signals.measures import MEASURES, Measure, take_measure
from dopd.signals.registry import SIGNALS, Signal, register_signal, signal_values
from dopd.signals.trial import try_signal

# isort: split
# In the order in which signals are listed.
from dopd.signals import tokens

# isort: split
from dopd.signals import rewards

# isort: split
from dopd.signals import answers

__all__ = [
    "MEASURES",
    "SIGNALS",
    "Measure",
    "Signal",
    "SignalBatch",
    "answers",
    "register_signal",
    "rewards",
    "signal_values",
    "take_measure",
    "tokens",
    "try_signal",
]
