"""Named routing tables. A method is rules and a source; nothing here runs."""

from dopd.methods.registry import CARDS, METHODS, Card, own_code, register_method, table

# isort: split
# In the order in which methods are listed.
from dopd.methods import dual

# isort: split
from dopd.methods import plain

# isort: split
from dopd.methods import adaptive, contrastive, rewarded, self_taught

__all__ = [
    "CARDS",
    "METHODS",
    "Card",
    "adaptive",
    "contrastive",
    "dual",
    "own_code",
    "plain",
    "register_method",
    "rewarded",
    "self_taught",
    "table",
]
