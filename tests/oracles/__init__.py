"""Slow, literal transcriptions of the papers, to hold the fast weightings against.

Each module is one weighting's and has one function::

    weights(steps: list[dict[str, Tensor]], generators: list[torch.Generator], **hyperparameters) -> list[Tensor]

``steps`` holds one dictionary a training step, with what the weighting reads among ``losses``, ``gramian``,
``jacobian`` and ``alignment``, in float64. ``generators`` holds one generator a step, seeded as ``View.generator`` is;
random methods draw from it in the order and the shape that the weighting does. Returned are the weights of each step,
the state starting afresh at the first. Nothing here is imported from the library.
"""
