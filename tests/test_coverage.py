"""How the inspected share of a strip is told."""

from hypothesis import given
from hypothesis import strategies as st
from rollsight.inspect.coverage import in_percent


@given(st.floats(0, 1))
def test_a_share_is_never_told_as_more_than_it_is(share):
    told = float(in_percent(share)) / 100
    assert told <= share + 1e-12
    assert share - told < 1.01e-4
    assert (in_percent(share) == "100.00") == (share > 1 - 1e-12)
