"""Mutation testing: small faults put into `dopd`, one at a time, that the quick tests should notice.

`python -m lab.mutation` works in a copy of the checkout: it measures which test runs which line, samples mutants,
runs for each the tests that run its line, and writes the table of survivors (`tests/MUTANTS.md`).
"""
