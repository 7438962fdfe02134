"""CR-MOGM, Zhou et al., NeurIPS 2022, Algorithm 1 with a constant α, for any inner method's oracle."""


def weights(steps, generators, inner, decay=0.9):
    history = []
    for found in inner(steps, generators):
        history.append(found if not history else decay * history[-1] + (1 - decay) * found)
    return history
