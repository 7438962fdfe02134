"""Engines: one way of measuring each. All that fill the same statistic have one signature.

=============  ======================================================================================
Engine         Fills
=============  ======================================================================================
``rows``       Jacobian and Gramian, one backward a task; alignments, one backward a task and sample
``batched``    Jacobian and Gramian, several tasks in one vectorised backward
``samples``    Jacobian, Gramian and alignments from per-sample gradients, by ``torch.func.vmap``
``features``   Gramian at the shared representation: ``rows``, for gradients at the encoder's output
``forward``    alignments, by dual parameters in the forward pass that gives the losses
``pullback``   alignments, by differentiating twice, of losses that are computed already
=============  ======================================================================================
"""

from mtlweight.engines import batched, pullback, rows, samples

ENGINES = ("auto", "rows", "batched", "features", "forward", "pullback", "samples")
ORDINARY = ("rows", "features")
"""Those that take one backward after the other, with which all else is compared."""

GRADIENTS = {
    "rows": rows.gradients,
    "features": rows.gradients,
    "batched": batched.gradients,
    "samples": samples.gradients,
}
"""``gradients(totals, inputs, keep_graph=...)``: for each total, one after the other, its gradients.

``inputs`` are leaves or intermediate tensors; gradients come by the place of their input. ``keep_graph`` says whether
the graph is needed again after the last total.
"""
ALIGNMENTS = {"pullback": pullback.alignments, "samples": samples.alignments, "rows": rows.alignments}
"""``alignments(losses, inputs, tangents)``: ``<∇ℓ[t, i], g>``, one tensor a task.

``losses`` are one ``[b]`` or scalar tensor a task, ``inputs`` are parameters, and ``tangents`` is ``g``, one tensor a
parameter. The losses' graph is kept.
"""
