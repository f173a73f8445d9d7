"""Seeded mutations of valid sidecars and merged folders are accepted or refused; see tests/helpers/fuzz.py."""

import pytest

from tests.helpers.fuzz import fuzz


@pytest.mark.parametrize("of_merged", [False, True], ids=["sidecars", "merged"])
def test_2000_mutations_are_accepted_or_refused(of_merged):
    found = fuzz(2000, seed=1, of_merged=of_merged)
    assert found["failures"] == []
    assert set(found["outcomes"]) == {"accepted", "refused"}
    assert sum(found["outcomes"].values()) == 2000
