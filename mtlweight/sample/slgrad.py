"""Sample-level weights from a held-out objective."""

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from mtlweight._checks import expect, expect_one_of
from mtlweight._errors import MTLWeightError
from mtlweight._view import Needs, State, View
from mtlweight._weighting import ReferenceUse, Traits, Weighting
from mtlweight.sample._shares import shares_of_help, softmax_of_help


@dataclass(frozen=True)
class SLGrad(Weighting):
    """Weighs each sample of each task by how much its gradient helps the main task on held-out data.

    ``w[t, i] = max(0, a[t, i]) / Σ_{u, j} max(0, a[u, j])`` with the alignment ``a[t, i] = <∇ℓ[t, i], ∇L_ref>``: to
    first order, ``-a[t, i]`` is how the held-out loss of the main task changes with the weight of sample ``i`` of task
    ``t``. Samples that help are kept; others drop out, such as noisy labels and harmful auxiliary tasks. Pass
    the held-out loss to ``combine(losses, reference=...)``, and losses per sample, ``[b]`` a task.

    *Reads* the alignment per sample. *Writes* ``[m, b]``, non-negative, with sum ``total`` (or 0, if no sample helps).
    *State* none; with ``lookahead`` each task's last total; with ``ema`` the optimizer keeps the averaged gradient.
    *Cost* the reference's forward and backward, and about one more forward if losses come as a callable (two more
    backwards if they come as tensors). ``lookahead`` adds a forward, a backward and a step, and memory for a copy of
    parameters and optimizer state; with ``samples_at="ahead"`` one more forward.

    Args:
        main: name of the task that the reference belongs to; or several, with a reference for each. The held-out loss
            is their sum then, and a sample helps if it lowers that sum, whatever it does to each.
        scope: parameters over which gradients are compared. ``"shared"``, the default and the official code's;
            ``"main"``, those and the heads of the main tasks, which finds mislabelled samples better;
            ``"all"``, every parameter of the wrapped optimizer.
        learn_reference: whether the reference's own gradient, known anyway, joins the step with weight 1. Default
            false, as published. With few but clean held-out samples, true is better.
        total: the sum of the weights. Default 1: one objective's worth. With ``normalize="task"`` each task's sum; with
            ``normalize=None`` a factor.
        normalize: ``"all"``, the default and the official code's: weights of all tasks and samples share ``total``, so
            that tasks compete; ``"task"``: each task's do; ``None``: ``w = total · max(0, a)``, in the unit of a
            squared gradient.
        temperature: ``None``, the default: samples that do not help have no weight. A number ``T``, ours:
            ``w ∝ exp(a / (T s))`` instead, with ``s`` the root mean square of the alignments: no sample drops out, and
            large ``T`` makes all weights equal.
        ema: share of the previous steps' average in the reference's gradient, for small held-out batches. Default 0,
            no averaging, as published.
        lookahead: whether the reference's gradient is taken one step of the optimizer ahead, which is then undone:
            parameters, buffers (of the modules named in ``model=`` or ``shared=``), optimizer and random state. That
            step gives each task its last total, spread evenly over its samples. Default false. Losses and reference
            must be callables.
        samples_at: where the samples' gradients are taken, if it looks ahead: ``"here"``, the default, which is the
            derivative of the held-out loss after the step in the weights of that step; or ``"ahead"``, as in the
            official code.
        replay: ``"official"``: the arithmetic of the official code, faults included, to reproduce runs of it. The step
            ahead has the last batch's weights by position, and is not undone, so that ``combine`` moves the parameters;
            weights are divided by ``b`` once more; and a smaller batch leaves the other columns of the one before in
            the normalisation. All other options must be left alone.

    Raises:
        MTLWeightError: if an option is unknown, out of range, or without meaning beside another; in ``combine``, if the
            losses are scalars or no reference is given.

    >>> SLGrad("left")(alignment=torch.tensor([[3.0, -1.0], [0.0, 1.0]]))
    tensor([[0.7500, 0.0000],
            [0.0000, 0.2500]])
    >>> SLGrad("left", normalize="task")(alignment=torch.tensor([[3.0, -1.0], [0.0, 1.0]]))
    tensor([[1., 0.],
            [0., 1.]])

    *Differs from the paper*: this follows the official code (vub-dl/SLGrad), since the paper's text was not at hand;
    without that code's look-ahead step that is never undone, and without its second division by the batch size. If no
    sample helps, all weights are 0 and the step is that of a zero gradient, as there: momentum still moves.

    References:
        Grégoire, Chaudhary, Verboven, "Sample-Level Weighting for Multi-Task Learning with Auxiliary Tasks", Applied
        Intelligence 2024, arXiv 2306.04519. Ren, Zeng, Yang, Urtasun, "Learning to Reweight Examples for Robust Deep
        Learning", ICML 2018, arXiv 1803.09050, for one task.
    """

    main: str | tuple[str, ...]
    _: KW_ONLY
    scope: Literal["shared", "main", "all"] = "shared"
    learn_reference: bool = False
    total: float = 1.0
    normalize: Literal["all", "task"] | None = "all"
    temperature: float | None = None
    ema: float = 0.0
    lookahead: bool = False
    samples_at: Literal["here", "ahead"] = "here"
    replay: Literal["official"] | None = None

    needs = Needs.ALIGNMENT | Needs.SAMPLES
    layout = ("lookahead", "replay")
    writes = "sample"

    def __post_init__(self) -> None:
        ReferenceUse.of("SLGrad", self.main, scope=self.scope)
        expect_one_of(self, "normalize", "all", "task", None)
        expect_one_of(self, "samples_at", "here", "ahead")
        expect_one_of(self, "replay", "official", None)
        expect(self, "> 0", "total", *([] if self.temperature is None else ["temperature"]))
        expect(self, "in [0, 1)", "ema")
        if self.temperature is not None and self.normalize is None:
            raise MTLWeightError(
                "SLGrad: temperature makes weights with a fixed sum: expected normalize='all' or 'task' beside it, "
                "found None. Choose one."
            )
        if self.samples_at == "ahead" and not self.lookahead:
            raise MTLWeightError(
                "SLGrad: samples_at='ahead' takes gradients one step ahead: expected lookahead=True beside it, found "
                "False. Set it, or leave samples_at alone."
            )
        if self.replay is not None:
            others = [f for f in fields(self) if f.name not in ("main", "replay")]
            changed = [f.name for f in others if getattr(self, f.name) != f.default]
            if changed:
                raise MTLWeightError(
                    f"SLGrad: replay='official' is the official code's arithmetic: expected no other option, found "
                    f"{', '.join(changed)}. Leave them out, or replay."
                )

    @property
    def traits(self) -> Traits:
        """Never negative; with the given sum over all tasks."""
        total: float | Literal["m"] | None = self.total if self.normalize == "all" else None
        if self.temperature is not None and self.normalize == "task" and self.total == 1:
            total = "m"
        if self.replay:
            return Traits(nonnegative=True)
        return Traits(nonnegative=True, total=total, scale_degree=1 if self.normalize is None else 0)

    @property
    def reference(self) -> ReferenceUse:
        """The main tasks' held-out loss, over the scope."""
        lookahead: Literal["reference", "both", "stay"] | None = None
        if self.lookahead:
            lookahead = "both" if self.samples_at == "ahead" else "reference"
        return ReferenceUse.of(
            "SLGrad",
            self.main,
            scope=self.scope,
            learn=float(self.learn_reference),
            ema=self.ema,
            lookahead="stay" if self.replay else lookahead,
        )

    def init(self, view: View) -> State:
        """No task has had a weight."""
        return {"weights": {}} if self.lookahead or self.replay else {}

    def ahead(self, view: View, state: State) -> Tensor:
        """Each task's last total, spread evenly; equal weights at first. In a replay, the last weights by position."""
        m, b = view.shares.shape
        table: Any = state["weights"]
        if self.replay:
            rows = [table.get(task, torch.full((b,), 1 / (m * b), dtype=view.dtype)) for task in view.tasks]
            if any(len(row) < b for row in rows):
                raise MTLWeightError(
                    "SLGrad: replay='official' takes weights from the last batch by position: expected no batch larger "
                    f"than the first, of {len(rows[0])}, found one of {b}. Use batches of one size."
                )
            return torch.stack([row[:b].to(view.device, view.dtype) for row in rows]) / b
        return view.gather(table, self.total / m)[:, None] * view.shares

    def weigh(self, view: View, state: State) -> tuple[Tensor, State]:
        """The alignments' positive parts, or their softmax, in the chosen normalisation."""
        a = view.sample_alignment
        if self.replay:
            return self._as_in_the_official_code(view, a, state)
        if self.normalize is None:
            weights = self.total * a.clamp(min=0)
        elif self.temperature is None:
            weights = self.total * shares_of_help(a, self.normalize)
        else:
            weights = self.total * softmax_of_help(a, self.normalize, self.temperature, view.shares > 0)
        if not self.lookahead:
            return weights, state
        return weights, {"weights": view.scatter(state["weights"], weights.sum(dim=1))}

    def _as_in_the_official_code(self, view: View, a: Tensor, state: State) -> tuple[Tensor, State]:
        table: Any = state["weights"]
        b = a.shape[1]
        pairs = zip(view.tasks, a, strict=True)
        rows = [torch.cat([row, table[task][b:].to(row)]) if task in table else row for task, row in pairs]
        weights = torch.stack(rows).clamp(min=0)
        total = weights.sum()
        weights = weights / torch.where(total != 0, total, 1.0)
        return weights[:, :b] / b, {"weights": view.scatter(table, weights)}
