"""Tiny trained models for the exports, made when first asked for and shared by all tests of a process."""

import pytest

from tests.tools import export_models


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(family) -> (base's folder, adapter's folder)."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = export_models.make_base(family, folder / f"{family}-base")
            adapter = export_models.make_adapter(
                base,
                folder / f"{family}-adapter",
                export_models.STEPS.get(family, export_models.USUAL)[1],
                **export_models.ADAPTERS[family],
            )
            made[family] = base, adapter
        return made[family]

    return make
