"""pytest -p tests.live: each failure is a line with its error the moment it happens, flushed: a run that is cut off has
said what failed."""

import pytest


def first_error(report: pytest.TestReport) -> str:
    """One line: the exception and its message (of workers as well, which send text)."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]


class Live:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(
                f"FAILED NOW {report.nodeid} [{report.when}, {report.duration:.1f} s]: {first_error(report)}"
            )
            reporter.flush()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers have nobody to tell
        config.pluginmanager.register(Live(config), "fastft-live")
