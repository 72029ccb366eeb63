"""Hard samples: the marks of any candidate, the least agreement that is still one, made again alone."""

import numpy as np
import pytest
from rollsight.synth.compose import Order, make_data, make_sample
from rollsight.synth.data_card import open_provenance
from rollsight.synth.hard import CANDIDATES, agreement, hard_samples


def dark(image):
    """A net that sees scratches where it is dark, of the left half: it finds what lies there and is dark."""
    found = image < 0.2
    found[:, 45:] = False
    return found


@pytest.mark.parametrize("method", ["gan", "paste"])
def test_candidates_have_the_same_marks_and_differ_as_their_method_may(generator, steel, method):
    first, *others = (
        make_sample(generator, steel, Order(seed=2, method=method), 1, number) for number in range(CANDIDATES)
    )

    marks = [[mark["deformation"] for mark in one.provenance["marks"]] for one in (first, *others)]
    assert all(of == marks[0] for of in marks)
    assert all((one.image != first.image).any() for one in others)
    assert all((one.mask == first.mask).all() for one in others) == (method == "gan")


@pytest.mark.parametrize("method", ["gan", "paste"])
def test_the_hardest_that_a_net_still_sees_is_kept_and_made_again_by_its_number(
    generator, steel, method, tmp_path
):
    order = Order(seed=2, method=method)
    make_data(
        generator, steel, order, 5, tmp_path / "made", make=hard_samples(generator, steel, order, sees=dark)
    )

    for line in open_provenance(tmp_path / "made"):
        candidates = [make_sample(generator, steel, order, line["index"], i) for i in range(CANDIDATES)]
        agreed = [round(agreement(one, dark), 4) for one in candidates]
        assert candidates[line["candidate"]].provenance["sha256"] == line["sha256"]
        assert line["agreement"] == agreed[line["candidate"]]
        assert line["agreement"] == min((a for a in agreed if a >= 0.1), default=max(agreed))


def test_agreement_is_of_the_new_marks_and_what_is_near_them(generator, steel):
    made = make_sample(generator, steel, Order(method="paste"), 0)
    new = np.logical_or.reduce(made.marks)

    assert agreement(made, lambda _: new) == 1
    assert agreement(made, lambda _: made.mask > 0) == 1  # other labels are no fault
    assert agreement(made, lambda _: ~new) == 0
    assert agreement(made, lambda _: np.ones_like(new)) < 0.5
