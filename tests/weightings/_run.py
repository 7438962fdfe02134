"""Weightings over several batches in a row."""

import torch

from mtlweight import View
from mtlweight._statistics import Given
from mtlweight._weighting import evaluate


def by_name(values):
    return values if isinstance(values, dict) else {str(t): value for t, value in enumerate(values)}


def run(weighting, batches, after=None, seed=0):
    """Weights and states over batches of losses: sequences, or mappings from task to loss where tasks come and go.

    ``after`` has the losses after each step, for weightings that observe them.
    """
    state, history, states = None, [], []
    for k, batch in enumerate(batches):
        batch = by_name(batch)
        source = Given(losses=torch.tensor(list(batch.values()), dtype=torch.float64), tasks=tuple(batch))
        weights, state = evaluate(weighting, View(source, step=k, seed=seed), state)
        if after is not None:
            later = by_name(after[k])
            source = Given(losses=torch.tensor(list(later.values()), dtype=torch.float64), tasks=tuple(later))
            state = weighting.observe(View(source, step=k, seed=seed), state)
        history.append(weights)
        states.append(state)
    return history, states


def run_rows(weighting, jacobians, losses=None, tasks=None):
    """Weights and states over Jacobians in a row; ``tasks`` has the names of each one's rows."""
    state, history, states = None, [], []
    for k, J in enumerate(jacobians):
        source = Given(
            jacobian=J,
            losses=None if losses is None else losses[k],
            tasks=None if tasks is None else tuple(tasks[k]),
        )
        weights, state = evaluate(weighting, View(source, step=k), state)
        history.append(weights)
        states.append(state)
    return history, states
