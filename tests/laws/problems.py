"""Small problems, weightings made of weightings, and runs over several steps."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtlweight import DWA, MGDA, RLW, UW, Constant, Equal, GradNorm, PCGrad, View, clip, ema, every, normalize
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate

SEED = 11


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def random_problem(rng, m, n=6):
    """Losses, Jacobian and alignment of one step, generic."""
    return {
        "losses": torch.from_numpy(rng.uniform(0.1, 10.0, m)),
        "jacobian": torch.from_numpy(rng.standard_normal((m, n)) * rng.uniform(0.1, 3.0, (m, 1))),
        "alignment": torch.from_numpy(rng.standard_normal(m)),
    }


@st.composite
def problems(draw, steps=4):
    """Some steps of one problem."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m = draw(st.integers(1, 4))
    return [random_problem(rng, m) for _ in range(steps)]


def factors(m):
    return arrays(np.float64, m, elements=st.floats(0.1, 10.0)).map(torch.from_numpy)


steady = st.one_of(  # not random, so that each can be run alone too
    st.just(Equal()),
    st.floats(0.1, 10.0).map(Constant),
    st.builds(UW, st.floats(0.01, 10.0)),
    st.builds(DWA, st.floats(0.1, 10.0), st.integers(1, 2)),
    st.just(MGDA()),
    st.builds(GradNorm, st.floats(0.0, 2.0), st.floats(0.01, 1.0)),
)
leaves = steady | st.just(RLW()) | st.just(PCGrad())


def _nest(inner):
    return st.one_of(
        st.builds(ema, inner, st.floats(0.0, 0.95)),
        st.builds(every, st.integers(1, 3), inner),
        st.builds(normalize, inner, st.floats(0.1, 10.0)),
        st.builds(clip, inner, st.floats(0.01, 0.5), st.floats(0.5, 5.0)),
        st.tuples(inner, inner).map(lambda pair: pair[0] >> pair[1]),
    )


weightings = st.recursive(leaves, _nest, max_leaves=3)


def run(weighting, steps, first=0):
    """The weights of each step, the state handed on."""
    state, history = None, []
    for k, step in enumerate(steps):
        weights, state = evaluate(weighting, View(Given(**step), step=first + k, seed=SEED), state)
        history.append(weights)
    return history


def same(found, expected, rtol=0.0, atol=0.0):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
