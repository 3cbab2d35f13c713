"""Completions looked at token by token: how they are recorded, and how one is made without training."""
