"""The rest of the matrix takes minutes: it runs where it is asked for."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.path.parent.name == "distributed" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="the rest of the matrix: run with -m slow"))
