"""Modules, and the learned graph that says which of them each task uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlweight._errors import MTLWeightError
from mtlweight.autograd.graph import Graph as AutogradGraph


@dataclass(frozen=True)
class Graph:
    """The task-to-module graph as a named table.

    Args:
        tasks: names of the rows.
        modules: names of the columns.
        values: ``[T, K]``, how much of each module each task uses.

    >>> from mtlweight.causal import Graph
    >>> graph = Graph(("a", "b"), ("shape", "colour"), torch.tensor([[0.9, 0.2], [0.1, 0.8]]))
    >>> print(graph)
       shape  colour
    a   0.90    0.20
    b   0.10    0.80
    >>> graph.top("b")
    'colour'
    """

    tasks: tuple[str, ...]
    modules: tuple[str, ...]
    values: Tensor

    def __getitem__(self, task: str) -> dict[str, float]:
        """The task's row, by module."""
        return dict(zip(self.modules, self.values[_index(self.tasks, task)].tolist(), strict=True))

    def top(self, task: str) -> str:
        """The module that the task uses most."""
        return self.modules[int(self.values[_index(self.tasks, task)].argmax())]

    def __str__(self) -> str:
        first = max(map(len, self.tasks))
        widths = [max(len(name), 4) for name in self.modules]
        rows = [["", *self.modules], *([task, *(f"{x:.2f}" for x in self[task].values())] for task in self.tasks)]
        return "\n".join(
            "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], widths, strict=True))])
            for row in rows
        )


@dataclass
class Call:
    """One forward pass of a selector, with its graph, as penalties read it.

    Args:
        tasks: names of the rows of ``mixed``.
        modules: ``[K, b, ...]``, the modules' outputs.
        mixed: ``[T, b, ...]``, the tasks' features.
    """

    tasks: tuple[str, ...]
    modules: Tensor
    mixed: Tensor


class ModuleSelector(nn.Module):
    """K modules side by side, and a learned graph ``A`` that says which of them each task reads.

    Task ``t`` gets the features ``h[t] = Σ_k A[t, k] Z_k`` with ``Z_k`` the output of module ``k``, and ``A`` the same
    for every sample: with ``gate="sigmoid"``, ``A = σ(logits)`` elementwise; with ``gate="softmax"`` each row of ``A``
    sums to 1, so that modules compete for a task. So features that are causal for one task and
    merely correlated with another can stay apart, and the graph has so few degrees of freedom that penalties such as
    :class:`~mtlweight.causal.Invariance` can determine them.

    A penalty that is bound to the selector (:meth:`~mtlweight.causal.Penalty.on`) makes it remember its forward passes
    in training mode, with gradients enabled, until the optimizer's next ``combine``.

    Args:
        modules: the K modules, a sequence or a mapping from name to module; any architectures with one output shape
            ``[b, ...]``. Dense feature maps are fine.
        tasks: names of the tasks.
        gate: ``"sigmoid"``, the default, or ``"softmax"``.
        spread: standard deviation of the initial logits around 0. Default 0.5, ours: 0 would give all tasks the same
            graph, and modules of equal weights would stay equal for ever.

    Attributes:
        bank: the modules, by name: an ``nn.ModuleDict``. These are the shared parameters.
        logits: ``[T, K]``, the graph's parameters. Give them a parameter group of their own for their own learning
            rate, and pass them as ``outer=`` to the optimizer to train them on the reference objective.

    Raises:
        MTLWeightError: without modules or tasks, for names that repeat, an unknown gate or a negative spread; in
            ``forward``, for an unknown task or outputs of different shapes.

    >>> from mtlweight.causal import ModuleSelector
    >>> selector = ModuleSelector([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)], ["a", "b"])
    >>> features = selector(torch.ones(5, 4))
    >>> features["a"].shape
    torch.Size([5, 3])

    *Reconstruction*: MT-CRL has no public code and its full text was not at hand; the formulas follow its abstract.

    References:
        Hu, Zhao, Yi, Yao, Hong, Sun, Chi, "Improving Multi-Task Generalization via Regularizing Spurious Correlation",
        NeurIPS 2022, arXiv 2205.09797.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module] | Mapping[str, nn.Module],
        tasks: Iterable[str],
        gate: Literal["sigmoid", "softmax"] = "sigmoid",
        *,
        spread: float = 0.5,
    ) -> None:
        super().__init__()
        named = dict(modules) if isinstance(modules, Mapping) else {str(k): module for k, module in enumerate(modules)}
        self.tasks = tuple(tasks)
        if not named or not all(isinstance(module, nn.Module) for module in named.values()):
            raise MTLWeightError(
                "ModuleSelector: expected at least one torch.nn.Module, in a sequence or a mapping by name; found "
                f"{[type(module).__name__ for module in named.values()]}. Pass the modules to choose from."
            )
        if not self.tasks or len({*self.tasks}) < len(self.tasks) or not all(isinstance(t, str) for t in self.tasks):
            raise MTLWeightError(
                f"ModuleSelector: expected names of tasks, each once; found {self.tasks}. Pass one string a task."
            )
        if gate not in ("sigmoid", "softmax"):
            raise MTLWeightError(f"ModuleSelector: expected gate 'sigmoid' or 'softmax', found {gate!r}. Choose one.")
        if not 0 <= spread < math.inf:
            raise MTLWeightError(f"ModuleSelector: expected a finite spread >= 0, found {spread}.")
        self.gate = gate
        self.bank = nn.ModuleDict(named)
        self.logits = nn.Parameter(spread * torch.randn(len(self.tasks), len(named)))
        self.remembers = False
        self._calls: list[Call] = []
        self._edges: dict[str, tuple[int, ...]] = dict.fromkeys(self.tasks, tuple(range(len(named))))

    def gates(self) -> Tensor:
        """``A``, ``[T, K]``, with its graph."""
        return self.logits.sigmoid() if self.gate == "sigmoid" else self.logits.softmax(dim=1)

    @property
    def graph(self) -> Graph:
        """The learned graph as it is now, as a named table."""
        return Graph(self.tasks, tuple(self.bank), self.gates().detach().cpu())

    def forward(self, *inputs: Any, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tasks' features.

        Args:
            inputs: what each module takes.
            tasks: for which tasks; all of them if left out. Modules that none of these uses do not run.

        Returns:
            dict[str, Tensor]: one tensor a task, of the shape of the modules' outputs.
        """
        wanted = self.tasks if tasks is None else tuple(tasks)
        rows = [_index(self.tasks, task) for task in wanted]
        used = sorted({k for task in wanted for k in self._edges[task]})
        modules = list(self.bank.values())
        stacked = self._stack([modules[k](*inputs) for k in used], used)
        mixed = torch.tensordot(self.gates()[rows][:, used].to(stacked.dtype), stacked, dims=1)
        if self.remembers and self.training and mixed.requires_grad:
            if len(used) < len(modules):
                whole = stacked.new_zeros(len(modules), *stacked.shape[1:])
                stacked = whole.index_copy(0, torch.tensor(used, device=stacked.device), stacked)
            self._calls.append(Call(wanted, stacked, mixed))
        return dict(zip(wanted, mixed.unbind(), strict=True))

    def calls(self, losses: Mapping[str, Tensor]) -> list[Call]:
        """The remembered forward passes that the losses come from. All are forgotten then."""
        calls, self._calls = self._calls, []
        nodes = {*AutogradGraph(losses.values()).nodes}
        return [call for call in calls if call.mixed.grad_fn in nodes]

    def prune(self, threshold: float = 0.5) -> ModuleSelector:
        """The selector for inference: edges below the threshold are cut, modules without an edge are gone.

        What is kept is shared with this selector, not copied; cut edges have logits of -∞ and stay cut if it is trained
        on. With sigmoid gates a task's features move by at most ``threshold * Σ |Z_k|`` over its cut modules.

        Args:
            threshold: the smallest gate that is kept.

        Raises:
            MTLWeightError: if a task would lose all its modules.
        """
        gates = self.gates().detach()
        keep = gates >= threshold
        for t, task in enumerate(self.tasks):
            if not keep[t].any():
                raise MTLWeightError(
                    f"prune({threshold}) would leave task {task!r} without modules: expected a threshold of at most "
                    f"its largest gate, found {gates[t].max():.3g}. Choose a smaller threshold."
                )
        columns = keep.any(dim=0).nonzero().flatten().tolist()
        names = list(self.bank)
        pruned = ModuleSelector({names[k]: self.bank[names[k]] for k in columns}, self.tasks, self.gate)
        pruned.logits = nn.Parameter(self.logits.detach().masked_fill(~keep, -math.inf)[:, columns])
        pruned._edges = {
            task: tuple(keep[t, columns].nonzero().flatten().tolist()) for t, task in enumerate(self.tasks)
        }
        return pruned.train(self.training)

    def extra_repr(self) -> str:
        """Tasks and gate."""
        return f"tasks={self.tasks}, gate={self.gate!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": []}  # a graph can be neither copied nor pickled

    def _stack(self, outputs: list[Any], used: list[int]) -> Tensor:
        shapes = [list(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in outputs]
        if isinstance(shapes[0], str) or any(shape != shapes[0] for shape in shapes):
            names = list(self.bank)
            found = ", ".join(f"{names[k]!r} {shape}" for k, shape in zip(used, shapes, strict=True))
            raise MTLWeightError(
                f"ModuleSelector mixes the modules' outputs: expected tensors of one shape [b, ...], found {found}. "
                "End the modules with layers of equal size."
            )
        return torch.stack(outputs)


def _index(tasks: tuple[str, ...], task: str) -> int:
    if task not in tasks:
        raise MTLWeightError(
            f"The selector has no task {task!r}: expected one of {', '.join(tasks)}. Name it in "
            "ModuleSelector(modules, tasks)."
        )
    return tasks.index(task)
