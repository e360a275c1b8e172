"""A pytest plugin: a test that takes more processor time than its tier or its `budget` mark allows fails."""

import math
import os
from collections.abc import Generator

import pytest

QUICK = 5.0
TIERS = {"thorough": 60.0, "slow": math.inf}
# Machines differ, other processes on the same cores evict caches, and a single test compiles more.
GRACE = 3.0

_start = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Returns the processor time of this process and of its ended children, which a busy machine does not stretch."""
    return sum(os.times()[:4])


def limit(item: pytest.Item) -> float:
    """Returns the CPU-seconds that a test may take, shared fixtures that it is the first to ask for included."""
    if mark := item.get_closest_marker("budget"):
        return float(mark.args[0])
    return next((seconds for tier, seconds in TIERS.items() if item.get_closest_marker(tier)), QUICK)


def is_enforced(config: pytest.Config) -> bool:
    """Returns whether whole files run: a test selected alone also pays for fixtures of its file."""
    return not (config.option.keyword or config.getoption("lf", False) or any("::" in arg for arg in config.args))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Notes the processor time at the start of a test."""
    item.stash[_start] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a passed test that took more than its limit."""
    report = yield
    spent, allowed = cpu_seconds() - item.stash[_start], limit(item)
    if call.when == "teardown" and report.passed and spent > GRACE * allowed and is_enforced(item.config):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {spent:.1f} CPU-seconds, more than {GRACE} × {allowed:g}: make it faster (smaller, or "
            "with a program that other tests have compiled), mark it `thorough`, or mark it `budget(seconds)`"
        )
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with the largest budgets first, so that all processes end at about the same time."""
    weights: dict[str, float] = {}
    for item in items:
        weights[str(item.path)] = weights.get(str(item.path), 0.0) + _weight(item)
    items.sort(key=lambda item: -weights[str(item.path)])


def _weight(item: pytest.Item) -> float:
    """Estimates the time of a test: most take little; of a mark for a whole file, the first test takes most."""
    return next((float(mark.args[0]) for mark in item.own_markers if mark.name == "budget"), QUICK / 20)
