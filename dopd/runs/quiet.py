"""Commands say what is dopd's, and leave out what the host's libraries say."""

import logging
import sys
import warnings

import transformers

from dopd.shown import visible


class _VisibleFormatter(logging.Formatter):
    """Messages quote what data and models hold."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _StandardErrorHandler(logging.Handler):
    """Writes to what `sys.stderr` is when a message comes: a notebook or a caller may have replaced it since."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def quiet_libraries() -> None:
    """Keep host libraries' chatter out of a run; warnings of dopd stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # each comparison that takes too long
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # PEFT looks for a whole model below an adapter on an adapter.
    warnings.filterwarnings("ignore", message="Could not find a config file in .* - will assume that the vocabulary")
    handler = _StandardErrorHandler()
    handler.setFormatter(_VisibleFormatter("%(levelname)s: %(message)s"))
    own = logging.getLogger("dopd")
    if not own.handlers:
        own.addHandler(handler)
        own.propagate = False
