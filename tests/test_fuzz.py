"""A few of the inputs that `make torture` tries by the thousand."""

from tests.torture.fuzz import SHARES, fuzz


def test_broken_inputs_are_refused_plainly_or_read_rightly():
    tallies = fuzz(n_inputs=315, seed=1)
    assert {name: tally.finds for name, tally in tallies.items() if tally.finds} == {}
    assert all(
        tally.n_inputs >= 15 * share for (name, share), tally in zip(SHARES.items(), tallies.values(), strict=True)
    )
    assert all(0 < tally.n_refused < tally.n_inputs for tally in tallies.values())
