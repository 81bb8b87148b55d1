"""A report at the end of a long run: the test files that took most CPU time, so that one that grows is seen.

Printed, never asserted: user and system time of the process and the processes that it waited for, by file, over all
workers of pytest-xdist. What a file's tests share with others (captures) is counted where it was first asked for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

PROPERTY = "cpu seconds"
SHOWN = 12
LONG = 60.0
"""CPU seconds from which on a run has a report."""


def cpu_seconds() -> float:
    return sum(os.times()[:4])


class CpuTime:
    def __init__(self) -> None:
        self.start = cpu_seconds()
        self.files: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        self.start = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """With the last report of a test goes what it took; a worker's reports reach the process that prints."""
        report = yield
        if call.when == "teardown":
            report.user_properties.append((PROPERTY, cpu_seconds() - self.start))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, seconds in report.user_properties:
            if name == PROPERTY and isinstance(seconds, float):
                self.files[report.nodeid.partition("::")[0]] += seconds

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        total = sum(self.files.values())
        if total < LONG:
            return
        terminalreporter.section(f"{total:.0f} CPU seconds in {len(self.files)} files, most of them in")
        for name, seconds in sorted(self.files.items(), key=lambda item: -item[1])[:SHOWN]:
            terminalreporter.write_line(f"{seconds:7.1f}  {name}")
