"""What settings may be, in one place: types, limits and choices, how they are read, and messages about wrong ones."""

from dopd.settings.described import (
    REQUIRED,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Setting,
    Share,
    Steps,
    Text,
    check,
    check_attributes,
    settings_of,
    settings_of_call,
    unknown_key,
)
from dopd.settings.problems import Problems, SettingsError
from dopd.settings.quoting import quoted
from dopd.settings.reading import as_mapping, dump_yaml, read_yaml, read_yaml_file

__all__ = [
    "REQUIRED",
    "Count",
    "Fraction",
    "Natural",
    "NotNegative",
    "Positive",
    "Probability",
    "Problems",
    "Seed",
    "Setting",
    "SettingsError",
    "Share",
    "Steps",
    "Text",
    "as_mapping",
    "check",
    "check_attributes",
    "dump_yaml",
    "quoted",
    "read_yaml",
    "read_yaml_file",
    "settings_of",
    "settings_of_call",
    "unknown_key",
]
