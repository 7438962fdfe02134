"""TorchJD's scalarizers, version 0.18.0: the gradient of the scalar is our weights, or a row says who is right."""

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtlweight import COSMOS, FAMO, GLS, IMTLL, PBI, STCH, UW, ExcessMTL, TrimmedMean
from tests.weightings._run import run, run_rows

scalarization = pytest.importorskip("torchjd.scalarization")
aggregation = pytest.importorskip("torchjd.aggregation")

moderate = st.floats(-3, 3).map(lambda e: 10.0**e)
losses = st.lists(moderate, min_size=1, max_size=5)
preferences = st.lists(st.floats(0.1, 10), min_size=5, max_size=5)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def slope(scalarizer, values):
    values = f64(values).requires_grad_()
    (gradient,) = torch.autograd.grad(scalarizer(values), values)
    return gradient


def agree(ours, theirs, rtol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


@given(losses)
def test_gls_is_geometric_mean(values):
    agree(GLS()(losses=f64(values)), slope(scalarization.GeometricMean(), values))


@given(losses, preferences, preferences, st.floats(0.01, 10), st.booleans())
def test_stch(values, preference, ideal, smoothing, uniform):
    preference = None if uniform else preference[: len(values)]
    peer = scalarization.STCH(smoothing, None if uniform else f64(preference), f64(ideal[: len(values)]))
    ours = STCH(smoothing, preference, ideal[: len(values)])(losses=f64(values))
    agree(ours, slope(peer, values))


@given(losses, preferences, st.floats(0, 10))
def test_cosmos(values, preference, penalty):
    preference = preference[: len(values)]
    ours = COSMOS(preference, penalty)(losses=f64(values))
    theirs = slope(scalarization.COSMOS(penalty, f64(preference)), values)
    # The two terms of a weight may cancel; each is compared to the precision of the larger one.
    size = float(f64(preference).max()) + penalty / float(f64(values).norm())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * size)


@given(losses, preferences, st.floats(0, 10))
def test_pbi_away_from_the_preferred_line(values, preference, penalty):
    direction = f64(preference[: len(values)])
    direction = direction / direction.norm()
    aside = f64(values) - (f64(values) @ direction) * direction
    assume(float(aside.norm()) > 1e-3)  # see DISAGREEMENTS: nearer to the line than that, its 1e-12 counts
    ours = PBI(penalty, preference[: len(values)])(losses=f64(values))
    agree(ours, slope(scalarization.PBI(penalty, f64(preference[: len(values)])), values))


def learned(scalarizer, batches, step_size):
    """The weights over some steps of plain descent on the scalarizer's own parameters."""
    optimizer = torch.optim.SGD(scalarizer.double().parameters(), lr=step_size)
    history = []
    for batch in batches:
        optimizer.zero_grad()
        values = f64(batch).requires_grad_()
        scalarizer(values).backward()
        history.append(values.grad)
        optimizer.step()
    return history


triples = st.lists(st.floats(0.1, 5), min_size=3, max_size=3)


@given(st.lists(triples, min_size=1, max_size=5))
@pytest.mark.parametrize(("ours", "peer", "factor"), [(IMTLL, "IMTLL", 1), (UW, "UW", 2)])
def test_imtl_l_and_uw_for_small_steps(ours, peer, factor, batches):
    # Ours steps implicitly; explicit descent is its limit. UW of TorchJD has half of both terms.
    step_size = 1e-4
    theirs = learned(getattr(scalarization, peer)(3), batches, factor * step_size)
    for a, b in zip(run(ours(step_size), batches)[0], theirs, strict=True):
        agree(a, factor * b)


@given(st.lists(st.tuples(triples, triples), min_size=1, max_size=6), st.floats(0.001, 0.5), st.floats(0, 0.1))
def test_famo_with_their_epsilon(steps, step_size, decay):
    peer = scalarization.FAMO(3, lr=step_size, weight_decay=decay).double()
    theirs = []
    for before, after in steps:
        theirs.append(slope(peer, before))
        peer.update(f64(after))
    ours = run(FAMO(step_size, decay, epsilon=1e-8), [a for a, _ in steps], [b for _, b in steps])[0]
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b)


matrices = st.integers(3, 6).flatmap(
    lambda m: st.lists(st.lists(st.integers(-5, 5), min_size=m, max_size=m), min_size=1, max_size=4).map(
        lambda columns: f64(columns).T
    )
)


@given(matrices, st.integers(0, 1))
def test_trimmed_mean(J, trim):
    theirs = aggregation.TrimmedMean(trim)(J)
    ours = (TrimmedMean(trim / len(J))(jacobian=J) * J).sum(dim=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@given(st.lists(st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=2, max_size=2), max_size=4))
@example([[[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [2, 2, 2]]])
def test_excess_mtl_after_a_warm_up(steps):
    # Two warm-up steps: with one only, see DISAGREEMENTS.
    rows = [f64([[3, 1, 2], [1, 2, 1]]), f64([[1, 1, 2], [1, 2, 3]]), *map(f64, steps)]
    peer = aggregation.ExcessMTL(robust_step_size=0.5, n_warmup_steps=2).double().weighting
    for a, J in zip(run_rows(ExcessMTL(0.5, warmup=2), rows)[0], rows, strict=True):
        agree(a, peer(J))


DISAGREEMENTS = {
    # their weights, ours, and who is right
    "GeometricMean of a zero loss": (
        lambda: slope(scalarization.GeometricMean(), [0.0, 1.0]),
        lambda: GLS()(losses=f64([0.0, 1.0])),
        "theirs is not finite: the logarithm of zero; ours leaves a task out that is at its minimum",
    ),
    "PBI on the preferred line for small losses": (
        lambda: slope(scalarization.PBI(5.0, f64([1.0, 1.0])), [2e-9, 1e-9]),
        lambda: PBI(5.0)(losses=f64([2e-9, 1e-9])),
        "PBI is invariant to the losses' unit, and theirs is not: it adds 1e-12 under the square root of d2²",
    ),
    "FAMO of small losses": (
        lambda: slope(scalarization.FAMO(2).double(), [1e-9, 2e-9]),
        lambda: FAMO()(losses=f64([1e-9, 2e-9])),
        "the weights are (2/3, 1/3) in any unit; theirs adds 1e-8 to each loss",
    ),
    "ExcessMTL in its first step": (
        lambda: aggregation.ExcessMTL().double().weighting(f64([[1.0, 0.0], [0.0, 2.0]])),
        lambda: ExcessMTL()(jacobian=f64([[1.0, 0.0], [0.0, 2.0]])),
        "it says that the first step is as in the official code; there only the scale is set, weights stay equal",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_the_peer_still_disagrees(name):
    theirs, ours, evidence = DISAGREEMENTS[name]
    assert evidence
    assert ours().isfinite().all()
    assert not torch.allclose(theirs(), ours(), rtol=1e-3)


def test_in_the_rows_above_ours_is_what_the_evidence_says():
    torch.testing.assert_close(FAMO()(losses=f64([1e-9, 2e-9])), f64([2 / 3, 1 / 3]))
    torch.testing.assert_close(PBI()(losses=f64([2e-9, 1e-9])), PBI()(losses=f64([2.0, 1.0])))
    unit = slope(scalarization.PBI(5.0, f64([1.0, 1.0])), [2.0, 1.0])
    torch.testing.assert_close(PBI()(losses=f64([2e-9, 1e-9])), unit)
    assert ExcessMTL()(jacobian=f64([[1.0, 0.0], [0.0, 2.0]])).tolist() == [0.5, 0.5]
