"""Privileged texts (hints): what they give away, whether they can be used, and how they are written and checked.

Read in this order: `text` and `numbers` (what a hint says), `answers` (what it must not say), `leaks`, `coverage`,
`audit`; then `templates`, `chat`, `journal`, `replies` and `others` (how they are written).
"""
