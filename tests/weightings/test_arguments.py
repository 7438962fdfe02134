"""What hyperparameters have in common."""

import numpy as np
import pytest
import torch

from mtlweight import (
    CRMOGM,
    DBMTL,
    DWA,
    GLS,
    OLAUX,
    STCH,
    UW,
    ExcessMTL,
    GradNorm,
    Krum,
    MTLWeightError,
    Needs,
    SDMGrad,
    SoftAdapt,
    Traits,
    View,
    weighting,
)
from mtlweight._statistics import Given

COUNTS = [
    (DWA, "period"),
    (STCH, "period"),
    (lambda **given: OLAUX("0", **given), "horizon"),
    (ExcessMTL, "warmup"),
    (Krum, "selected"),
    (Krum, "faulty"),
    (SoftAdapt, "order"),
    (SDMGrad, "iterations"),
]


@pytest.mark.parametrize(("build", "name"), COUNTS, ids=lambda x: x if isinstance(x, str) else None)
@pytest.mark.parametrize("value", [2.5, 2.0, -1, True, "2"])
def test_a_count_is_a_whole_number(build, name, value):
    with pytest.raises(MTLWeightError, match=rf"expected {name} >= [01], found {value!r}\. Pass a whole number"):
        build(**{name: value})
    assert build(**{name: np.int64(2)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_log_variance_is_finite(value):
    with pytest.raises(MTLWeightError, match="UW: expected a finite initial, found"):
        UW(initial=value)


@pytest.mark.parametrize("each", [UW(), GradNorm(), DBMTL(), GLS()], ids=repr)
def test_a_negative_loss_is_named(each):
    with pytest.raises(MTLWeightError, match=r"expected losses >= 0,.* since .* found 1 = -0\.5\."):
        each(losses=torch.tensor([1.0, -0.5]), jacobian=torch.eye(2))
    with pytest.raises(MTLWeightError, match=r"found 0 = -1\."):
        each(losses=torch.tensor([-1.0, torch.nan]), jacobian=torch.eye(2))
    with pytest.raises(MTLWeightError, match=r"found 1 = -1\."):
        each(losses=torch.tensor([torch.nan, -1.0]), jacobian=torch.eye(2))


def test_a_row_of_a_table_does_not_hold_on_to_the_others():
    view = View(Given(losses=torch.ones(3)))
    table = view.scatter({}, torch.ones(3, 1000))
    assert [row.untyped_storage().nbytes() for row in table.values()] == [4000, 4000, 4000]


def test_crmogm_tells_what_it_is_made_of():
    inner = weighting(Needs.NOTHING, traits=Traits(samples=2))(lambda view: torch.ones(len(view.tasks)))
    assert CRMOGM(inner).parts == (inner,)
    assert CRMOGM(inner).traits.samples == 2
