"""Questions to an autograd graph."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlweight.autograd.graph import Graph, leaves_of_each


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6), st.booleans())
def test_the_leaves_of_each_output_are_found_in_one_walk(uses, chained):
    """Outputs of some of six parameters each, or of the output before them as well."""
    parameters = [torch.ones((), requires_grad=True) for _ in range(6)]
    outputs, reached = [], []
    for use in uses:
        before, known = (outputs[-1], reached[-1]) if chained and outputs else (0.0, set())
        outputs.append(sum(parameters[k].exp() for k in use) + before)
        reached.append({id(parameters[k]) for k in use} | known)
    found = leaves_of_each([*outputs, parameters[0]])
    assert found[-1] == {id(parameters[0])}
    for t, mine in enumerate(reached):
        assert {id(leaf) for leaf in Graph([outputs[t]]).leaves} == mine
        assert mine <= found[t] <= set().union(*reached[: t + 1])
