"""2,000 seeded mutations of valid sidecars are accepted or refused; see tests/helpers/fuzz.py."""

from tests.helpers.fuzz import fuzz


def test_2000_mutations_are_accepted_or_refused():
    found = fuzz(2000, seed=1)
    assert found["failures"] == []
    assert set(found["outcomes"]) == {"accepted", "refused"}
    assert sum(found["outcomes"].values()) == 2000
