"""The verifier `code`: an answer is a program, and right if it passes the tests of its row."""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from dopd.errors import ConfigError
from dopd.verifiers import sandbox
from dopd.verifiers.code_tests import CodeTests, called_tests, read_tests, same_output, source_in
from dopd.verifiers.sandbox import Limits


class CodeVerifier:
    """Runs the Python of an answer in a sandbox, against the tests of its row (`dopd.verifiers.code_tests`).

    Args:
        allow_code_execution (`bool`): nothing is run without it.
        seconds (`float`): that a program may take for one input, or functions for one test.
        total_seconds (`float`): for all tests of an answer; what is left over then has not passed.
        memory_mb (`int`): of address space, in MiB.
        partial (`bool`): the share of tests that pass as the score; 1 if all pass and otherwise 0 if left out.
        isolation (`str`): `full` refuses to run where the machine cannot hold all of it; `limits` runs with whatever
            it can hold, for machines on which nothing is worth protecting.

    Raises:
        ConfigError: it is not allowed, or the machine cannot lock code in.
    """

    def __init__(
        self,
        *,
        allow_code_execution: bool = False,
        seconds: Annotated[float, Gt(0)] = 10.0,
        total_seconds: Annotated[float, Gt(0)] = 30.0,
        memory_mb: Annotated[int, Ge(64)] = 1024,
        partial: bool = False,
        isolation: Literal["full", "limits"] = "full",
    ) -> None:
        if not allow_code_execution:
            raise ConfigError(
                "verifier (='code') runs programs that a model has written: set allow_code_execution: true in "
                "verifier_options (--verifier-options '{allow_code_execution: true}'). They run in a sandbox "
                "(docs/how-to/verifiers.md says what it holds and what it does not)"
            )
        sandbox.check_locks(isolation)
        self.seconds, self.total_seconds, self.memory_mb = seconds, total_seconds, memory_mb
        self.partial, self.isolation = partial, isolation

    @property
    def described(self) -> str:
        """What the sandbox holds on this machine."""
        return f"code of answers runs in a sandbox: {sandbox.described(self.isolation)}"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """The score of an answer.

        Raises:
            DataError: the row has no tests.
        """
        tests = read_tests(row)
        source = source_in(completion, tests)
        if not source:
            return 0.0
        passed = self._passed(source, tests)
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _passed(self, source: str, tests: CodeTests) -> int:
        until, passed = time.monotonic() + self.total_seconds, 0
        assertions = [*tests.assertions, *called_tests(tests.calls, source)]
        if assertions:
            seconds = min(self.seconds * len(assertions), self.total_seconds)
            passed += sandbox.run_tests(source, assertions, Limits(seconds, self.memory_mb), self.isolation).passed
            if passed < len(assertions) and not self.partial:
                return passed
        for given_input, wanted in tests.programs:
            left = until - time.monotonic()
            if left <= 0:
                break
            limits = Limits(min(self.seconds, left), self.memory_mb)
            outcome = sandbox.run_program(source, given_input, limits, self.isolation)
            if outcome.is_well and same_output(outcome.output, wanted):
                passed += 1
            elif not self.partial:
                break
        return passed
