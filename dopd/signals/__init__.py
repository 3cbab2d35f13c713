"""Numbers known of every token before the loss: what rows select by, weigh by, and take as advantages."""

from dopd.signals.batch import SignalBatch
from dopd.signals.measures import MEASURES, Measure, take_measure
from dopd.signals.registry import SIGNALS, Signal

__all__ = ["MEASURES", "SIGNALS", "Measure", "Signal", "SignalBatch", "take_measure"]
