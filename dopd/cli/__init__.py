"""The `dopd` command."""
