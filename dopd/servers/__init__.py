"""Models on a server: what a table can get from one, the requests, and a scorer that asks it beside the local models.

Read in this order: `tables` (what is asked for), `contract` (requests and replies), `client` (how they travel),
`teacher` (scores of a batch), `handshake` (what is asked before the first step).
"""

from dopd.servers.client import KEY_VARIABLE, Client, Patience, server_urls, teacher_places
from dopd.servers.handshake import Tried, check_tokens, introduced
from dopd.servers.tables import ServedTable, ServerSupport, served_table, support_in_words
from dopd.servers.teacher import Introduction, ServedScorer, ServedTeacher, ServedTeachers

__all__ = [
    "KEY_VARIABLE",
    "Client",
    "Introduction",
    "Patience",
    "ServedScorer",
    "ServedTable",
    "ServedTeacher",
    "ServedTeachers",
    "ServerSupport",
    "Tried",
    "check_tokens",
    "introduced",
    "served_table",
    "server_urls",
    "support_in_words",
    "teacher_places",
]
