"""From a configuration to a run folder: what the command line does, callable from Python."""

from dopd.runs.settings import RunSettings, load_settings

__all__ = ["RunSettings", "load_settings"]
