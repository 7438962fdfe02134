"""The gradient that others are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError, NonFiniteError
from mtlweight._statistics import all_finite, statistics_dtype
from mtlweight._view import Needs
from mtlweight._weighting import ReferenceUse
from mtlweight.engines import _losses
from mtlweight.engines._graph import Backward
from mtlweight.engines._layers import Factors, Linear, linear_layers, made
from mtlweight.engines._plan import Plan
from mtlweight.engines._range import dense, gradient, wide


class Reference:
    """The gradient of the reference objective, computed once.

    Args:
        objective: the reference as the user gave it; of several objectives one is evaluated at a time.
        plan: says over which parameters.
    """

    def __init__(self, objective: Any, plan: Plan) -> None:
        use = plan.use or ReferenceUse()
        trainable = {id(p) for p in plan.trainable}
        outer = {id(p) for p in plan.outer}
        shared: set[int] = set()
        if plan.use is not None or Needs.ALIGNMENT in plan.weighting.needs:  # else the outer parameters alone learn
            shared = trainable if use.scope == "all" else {id(p) for p in plan.shared_for("the alignment")}
        allowed = shared | trainable if use.scope == "main" and shared else shared
        total: dict[Tensor, Tensor] = {}
        factors: dict[Tensor, Factors] = {}
        self.narrow = False
        self.objective = torch.zeros(())
        follows = plan.follows and not (use.learn or use.ema or use.unit or outer)

        def add(share: float, loss: Tensor) -> None:
            graph = Backward([loss])
            part = share * wide(loss if plan.ordinary else loss.detach())
            self.objective = self.objective.to(part) + part
            leaves = graph.leaves
            wanted = [p for p in leaves if use.learn or id(p) in allowed or id(p) in outer]
            # Functions that hide their parameters have data in their place that require grad: seen if they run.
            data = [x for x in leaves if not isinstance(x, torch.nn.Parameter) and all(x is not p for p in wanted)]
            # It may share its graph with the losses. And a compiled model whose first backward may free the graph
            # refuses later ones that keep it, which the rows need.
            self.narrow |= graph.narrow
            layers = linear_layers(graph, wanted, Linear.leads) if follows and not graph.narrow else {}
            asked = [layers[k].output if k in layers else p for k, p in enumerate(wanted)]
            check = bool(graph.compiled)
            with plan.measuring():
                found = gradient(loss, [*asked, *data], keep_graph=True, narrow=graph.narrow, check=check)
            for k, (p, g) in enumerate(zip(wanted, found, strict=False)):
                if g is None:
                    continue
                term = wide(dense(g)) if share == 1 else share * wide(dense(g))
                if k in layers and p not in total and p not in factors:
                    factors[p] = Factors(term, layers[k].kept())
                    continue
                term = Factors(term, layers[k].x).dense if k in layers else term
                before = factors.pop(p).dense if p in factors else total.get(p)
                total[p] = term if before is None else before + term

        def gradients() -> dict[Tensor, Tensor]:
            self.by_name = _losses.visit(objective, add, use.main)
            return total

        own = total
        if plan.processes is None:
            gradients()
        else:  # the parameters get their own, for whoever averages gradients, and all compare with the mean
            every = dict.fromkeys([*plan.trainable, *(plan.shared or []), *plan.outer])
            total = plan.processes.averaged(gradients, [p for p in every if id(p) in allowed or id(p) in outer])
        self.outer = [(p, g) for p, g in own.items() if id(p) in outer]
        self.learnt = [(p, g) for p, g in own.items() if id(p) not in outer] if use.learn else []
        self._made = total
        self.parameters = [p for p in (*factors, *total) if id(p) in allowed]
        plan.expect_real(self.parameters)
        self.terms: list[Tensor | Factors] = [factors[p] if p in factors else total[p] for p in self.parameters]
        if shared and not any(id(p) in shared for p in self.parameters):
            wanting, through = (
                ("parameter of the optimizer", "with the optimizer's")
                if use.scope == "all"
                else ("shared parameter", "through the shared")
            )
            raise MTLWeightError(
                f"No {wanting} is in the reference's graph: expected the reference to be computed {through} "
                "parameters, found other parameters only. Use the same model for losses and reference."
            )
        if outer and not any(id(p) in outer for p in total):
            raise MTLWeightError(
                "No parameter of outer=... is in the reference's graph: expected the reference to be computed with the "
                "outer parameters, found others only. Use the same model for losses and reference."
            )
        if use.ema:
            self.terms = [*self._averaged(use.ema, plan)]
        if use.unit:
            dtype = statistics_dtype(self.tangents[0].device)  # squares of small numbers are 0 in float32
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in self.tangents]).norm()
            self.terms = [g / torch.where(norm > 0, norm, 1.0).to(g.dtype) for g in self.tangents]

    @property
    def tangents(self) -> list[Tensor]:
        """The gradient over :attr:`parameters`."""
        return [made(term) for term in self.terms]

    def expect_finite(self, plan: Plan) -> None:
        """Raises if the reference is to blame for an alignment that is not finite."""
        pairs = [*zip(self.parameters, self.tangents, strict=True), *self._made.items()]
        if not all_finite([g for _, g in pairs]):
            bad = next(p for p, g in pairs if not g.isfinite().all())
            raise NonFiniteError(
                "The gradient of the reference is not finite: expected finite numbers, found NaN or infinity for "
                f"{plan.called(bad)}. Look at the held-out batch and its loss."
            )

    def _averaged(self, decay: float, plan: Plan) -> list[Tensor]:
        """``v ← decay·v + (1 - decay)·g`` for each parameter, by its position; the first gradient starts it."""
        names = {p: str(k) for k, p in enumerate(dict.fromkeys([*plan.every, *(plan.shared or [])]))}
        known: Any = plan.memory.get("reference", {})
        averages = {}
        for p, g in zip(self.parameters, self.tangents, strict=True):
            old = known.get(names[p])
            averages[names[p]] = g if old is None else decay * old.to(g) + (1 - decay) * g
        plan.memory["reference"] = {**known, **averages}
        return [*averages.values()]


def main_scope(plan: Plan, losses: dict[str, Tensor], parameters: list[Tensor]) -> list[int]:
    """The places of the parameters that are shared or that the main task's loss reaches."""
    mains = plan.use.main if plan.use is not None else ()
    reached = Backward(losses[t] for t in mains if t in losses).leaves
    allowed = {id(p) for p in (*(plan.shared or []), *reached)}
    return [k for k, p in enumerate(parameters) if id(p) in allowed]
