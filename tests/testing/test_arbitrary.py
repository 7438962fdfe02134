"""The strategies build what they promise, exactly, and shrink to what a person can read."""

from fractions import Fraction

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from mtlweight import Needs
from mtlweight.testing import arbitrary

QUICK = settings(max_examples=40, deadline=None)


def exact(J):
    return [[Fraction(int(x)) for x in row] for row in J.tolist()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def rank(rows):
    rows, found = [list(row) for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] / rows[found][column]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def balance(rows, least):
    """Whether the first row is minus a combination of the others with integer coefficients from ``least`` to 2."""
    sums = {tuple(rows[0])}
    for row in rows[1:]:
        sums = {tuple(x + k * y for x, y in zip(s, row, strict=True)) for s in sums for k in range(least, 3)}
    return any(not any(s) for s in sums)


def pairs(rows):
    return [dot(a, b) for i, a in enumerate(rows) for b in rows[:i]]


PROPERTIES = {
    "generic": lambda J: rank(J) == len(J),
    "conflicting": lambda J: rank(J) == len(J) and all(x < 0 for x in pairs(J)),
    "opposed": lambda J: dot(J[0], J[1]) < 0 and dot(J[0], J[1]) ** 2 == dot(J[0], J[0]) * dot(J[1], J[1]),
    "duplicate rows": lambda J: J[0] == J[1] and any(J[0]),
    "a zero row": lambda J: any(not any(row) for row in J),
    "rank one": lambda J: rank(J) == 1,
    "rank deficient": lambda J: rank(J) < len(J),
    "orthogonal": lambda J: rank(J) == len(J) and not any(pairs(J)),
    "weakly stationary": lambda J: balance(J, 0),
    "strongly stationary": lambda J: balance(J, 1),
    "m > n": lambda J: len(J) > len(J[0]),
}


def test_every_kind_has_a_property_here_and_a_proof():
    assert PROPERTIES.keys() == arbitrary.KINDS.keys()
    assert all(build.__doc__ for build in arbitrary.KINDS.values())


@pytest.mark.parametrize("kind", arbitrary.KINDS)
def test_jacobians_of_the_kind_have_its_property(kind):
    @QUICK
    @given(st.data())
    def check(data):
        m = data.draw(st.integers(1, 5).filter(lambda m: arbitrary.kinds_for(m, [kind])))
        assert PROPERTIES[kind](exact(data.draw(arbitrary.jacobians(m, kind=kind))))

    check()


@pytest.mark.parametrize(
    ("kind", "smallest"),
    [
        ("generic", [[1.0, 0.0], [0.0, 1.0]]),
        ("conflicting", [[2.0, -1.0], [-1.0, 2.0]]),
        ("opposed", [[1.0], [-1.0]]),
        ("duplicate rows", [[1.0], [1.0]]),
        ("a zero row", [[0.0], [0.0]]),
        ("strongly stationary", [[-1.0], [1.0]]),
        ("m > n", [[1.0], [1.0]]),
    ],
)
def test_jacobians_shrink_to_small_integers(kind, smallest):
    strategy = arbitrary.jacobians(2, kind=kind, scales=arbitrary.ALL_SCALES, spread=6)
    assert find(strategy, lambda _: True, settings=settings(database=None)).tolist() == smallest


@QUICK
@given(arbitrary.jacobians(3, kind="generic", scales=arbitrary.ALL_SCALES, spread=6))
def test_scales_stay_within_their_bounds(J):
    sizes = J[J != 0].abs()
    assert sizes.min() >= 0.99e-16
    assert sizes.max() <= 3.01e21


@pytest.mark.parametrize(
    ("kind", "holds"), [("positive", lambda a: a > 0), ("negative", lambda a: a < 0), ("zero", lambda a: a == 0)]
)
@pytest.mark.parametrize("samples", [None, 2])
def test_alignments_have_the_sign_and_the_shape(kind, holds, samples):
    @QUICK
    @given(arbitrary.alignments(3, samples=samples, kind=kind, scales=(-3, 3)))
    def check(alignment):
        assert alignment.shape == ((3,) if samples is None else (3, samples))
        assert holds(alignment).all()

    check()


@pytest.mark.parametrize(("domain", "least"), [("positive", 1.0), ("nonnegative", 0.0), ("real", -9.0)])
def test_losses_stay_in_the_domain(domain, least):
    @QUICK
    @given(arbitrary.losses(3, domain=domain))
    def check(losses):
        assert losses.min() >= least

    check()
    lowest = find(arbitrary.losses(1, domain=domain), lambda x: x.min() == least, settings=settings(database=None))
    assert lowest.tolist() == [least]


@QUICK
@given(arbitrary.gramians(3))
def test_gramians_are_symmetric_and_positive_semidefinite(G):
    assert torch.equal(G, G.T)
    assert torch.linalg.eigvalsh(G).min() >= -1e-9


@QUICK
@given(arbitrary.views(2, samples=True))
def test_the_statistics_of_a_view_belong_together(view):
    assert view.losses.shape == (2,)
    assert torch.allclose(view.gramian, view.jacobian @ view.jacobian.T)
    assert torch.allclose(view.sample_alignment.mean(dim=1), view.alignment)
    assert Needs.SAMPLES in view._needs


@QUICK
@given(arbitrary.problems(3, kinds=["strongly stationary"], samples=True))
def test_the_mean_of_the_samples_gradients_has_the_property(steps):
    assert PROPERTIES["strongly stationary"](exact(steps[0].jacobian))
