"""What the trainer reads: columns, checks, and the plain and privileged views of a prompt."""

from dopd.data.checks import DatasetReport, check_prompts
from dopd.data.privileged import PrivilegedTemplate

__all__ = ["DatasetReport", "PrivilegedTemplate", "check_prompts"]
