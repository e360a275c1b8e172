"""The budget plugin on made-up tests, with limits of fractions of a second."""

import pytest

from tests import budget

pytest_plugins = ["pytester"]

TESTS = """
import subprocess, sys, time
import pytest

BURN = "import time\\nwhile time.process_time() < 0.3: pass"

def burn():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass

@pytest.fixture
def long():
    burn()

def test_own(): burn()
def test_of_fixture(long): pass
def test_of_command(): subprocess.run([sys.executable, "-c", BURN], check=True)
def test_waiting(): time.sleep(0.3)
@pytest.mark.budget(0.12)
def test_over_budget(): burn()
@pytest.mark.budget(1)
def test_within_budget(): burn()
@pytest.mark.thorough
def test_thorough(): burn()
@pytest.mark.slow
def test_slow(): burn()
"""
OVER = {"test_own", "test_of_fixture", "test_of_command", "test_over_budget", "test_thorough"}


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch):
    """Runs made-up tests under the plugin."""
    monkeypatch.setattr(budget, "QUICK", 0.1)
    monkeypatch.setattr(budget, "GRACE", 1.5)
    monkeypatch.setitem(budget.TIERS, "thorough", 0.15)
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nmarkers = ["budget(seconds)", "thorough", "slow"]')
    pytester.makepyfile(test_made_up=TESTS, test_long="import pytest\n@pytest.mark.budget(9)\ndef test(): pass")
    return lambda *args: pytester.inline_run("-p", "tests.budget", "-p", "no:xdist", "-p", "no:cacheprovider", *args)


def test_over_budget_fails(run):
    done = run()
    failed = [report for report in done.getfailures() if report.when == "teardown"]
    assert {report.nodeid.split("::")[1] for report in failed} == OVER
    assert all("CPU-seconds, more than 1.5 × 0." in report.longreprtext for report in failed)
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_picked_tests_pass(run):
    assert run("test_made_up.py::test_own").ret == run("-k", "own").ret == pytest.ExitCode.OK


def test_longest_file_first(run):
    (finished,) = run("--collect-only").getcalls("pytest_collection_finish")
    assert [item.name for item in finished.session.items][:2] == ["test", "test_own"]
