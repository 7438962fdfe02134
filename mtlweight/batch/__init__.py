"""From what users pass to ``combine`` to weights and a scalar, in the order in which it happens.

``settings`` and ``step`` say what is to be measured; ``losses`` and ``reference`` take what the user passed;
``lookahead`` goes one step ahead if a weighting looks there; ``read`` makes a ``batch`` of it. Its losses come from one
of three sources: with their graph (``whole``), in parts (``in_parts``), or from several processes (``joined``).
"""
