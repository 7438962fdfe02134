"""Trainings that can be cut in two: one for every weighting that ships, for combinators in each other, for the graph.

``python -m tests.optimizer.resumable FOLDER`` is the second half: it loads the checkpoints in the folder, trains to the
end, and leaves what it arrived at there.
"""

import functools
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mtlweight import (
    DWA,
    FAMO,
    MGDA,
    RLW,
    UW,
    GradDrop,
    GradNorm,
    MoCo,
    MultiTaskOptimizer,
    PCGrad,
    SLGrad,
    Weighting,
    clip,
    ema,
    every,
    normalize,
)
from mtlweight.causal import Balance, Decorrelation, Invariance, Sparsity, warmup
from tests.causal.problems import Problem as CausalProblem
from tests.problems import Problem
from tests.registry import BY_READING

HALF = 3

COMBINED = [
    UW() >> DWA() >> PCGrad(),
    FAMO() >> MGDA(),
    DWA() >> MoCo(),
    UW() >> GradDrop(),
    ema(every(2, DWA() >> MGDA()), decay=0.5),
    every(2, ema(RLW())),
    every(2, FAMO()),
    normalize(ema(GradNorm()), total=2.0),
    clip(every(2, UW()), low=0.1) >> normalize(DWA()),
    every(2, SLGrad("0", lookahead=True)),
    SLGrad("0", ema=0.5) >> ema(UW()),
]
"""Combinators in each other: no step of theirs is the first of a period just where a training is cut."""


class Training:
    """A model, its optimizer, and steps on batches that are the same in every process.

    Task ``"1"`` is absent from the last step of the first half. In the second half the mapping has another order.

    Args:
        weighting: on trial.
        tasks: their number.
        seed: of the parameters at the start.
    """

    def __init__(self, weighting: Weighting, tasks: int = 3, seed: int = 0) -> None:
        self.problem = Problem(tuple(map(str, range(tasks))), seed=seed)
        self.model: nn.Module = self.problem.model
        self.absent = {"1"} if tasks > 1 else set()
        self.optimizer = MultiTaskOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=0.01), weighting, shared=self.problem.encoder, model=self.model
        )

    def combined(self, k: int) -> Tensor:
        """The weighted losses of batch ``k``."""
        tasks = [task for task in self.problem.tasks if k != HALF - 1 or task not in self.absent]
        losses = functools.partial(self.problem.samples, k, tasks if k < HALF else tasks[::-1])
        return self.optimizer.combine(losses, reference=functools.partial(self.problem.reference, k + 50))

    def run(self, first: int, last: int) -> None:
        for k in range(first, last):
            self.optimizer.zero_grad()
            self.combined(k).backward()
            self.optimizer.step()

    def parts(self) -> dict:
        """What ``torch.distributed.checkpoint`` saves, and fills in place: as in docs/optimizer.md."""
        weighting = io.BytesIO()
        torch.save(self.optimizer.state_dict()["mtlweight"], weighting)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer),
            "weighting": weighting.getvalue(),
        }

    def load_parts(self, parts: dict) -> None:
        inner = self.optimizer.optimizer
        set_model_state_dict(self.model, parts["model"])
        set_optimizer_state_dict(self.model, inner, parts["optimizer"])
        own = torch.load(io.BytesIO(parts["weighting"]), weights_only=True)
        self.optimizer.load_state_dict({**inner.state_dict(), "mtlweight": own})

    def checkpoint(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def result(self) -> dict:
        report = self.optimizer.report
        return {**self.checkpoint(), "weights": report.weights, "losses": report.losses, "gramian": report.gramian}


class Causal(Training):
    """Modules and their graph, which learns from the reference, with penalties that warm up."""

    def __init__(self, weighting: Weighting, seed: int = 0) -> None:
        self.problem = CausalProblem(seed=seed)
        self.model = self.problem.model
        selector = self.problem.selector
        penalty = warmup(HALF + 2, 2.0 * Invariance() + Decorrelation() + Sparsity() + Balance())
        groups = [
            {"params": [*selector.bank.parameters(), *self.problem.heads.parameters()]},
            {"params": selector.logits, "lr": 0.5},
        ]
        self.optimizer = MultiTaskOptimizer(
            torch.optim.Adam(groups, lr=0.01),
            weighting,
            shared=selector.bank,
            model=self.model,
            penalty=penalty.on(selector),
            outer=selector.logits,
        )

    def combined(self, k: int) -> Tensor:
        return self.optimizer.combine(
            lambda: self.problem.losses(k=k), reference=lambda: self.problem.losses(k=k + 50)["a"], environments=3
        )


def registered(case, seed: int = 0) -> Training:
    """The training of one row of the registry."""
    tasks = 3 if 3 in case.tasks else max(case.tasks)
    return Training(case.weighting, tasks, seed)


IN_EACH_OTHER: dict[str, Callable[..., Training]] = {
    **{repr(each): lambda seed=0, each=each: Training(each, seed=seed) for each in COMBINED},
    **{
        f"the graph under {each!r}": lambda seed=0, each=each: Causal(each, seed)
        for each in (UW(), PCGrad(), SLGrad("a"))
    },
}
TRAININGS: dict[str, Callable[..., Training]] = {
    **{repr(case.weighting): lambda seed=0, case=case: registered(case, seed) for case in BY_READING},
    **IN_EACH_OTHER,
}
"""By name: from a seed of the initial parameters to a training that has not begun."""


def first_half(folder: Path) -> dict[str, Training]:
    """Trains, and saves in both ways: torch.save, and torch.distributed.checkpoint."""
    trainings = {name: make() for name, make in TRAININGS.items()}
    for training in trainings.values():
        training.run(0, HALF)
    torch.save({name: training.checkpoint() for name, training in trainings.items()}, folder / "checkpoint.pt")
    _alone(dcp.save, {name: training.parts() for name, training in trainings.items()}, folder / "distributed")
    return trainings


def second_half(folder: Path) -> None:
    """Loads, trains, and saves what comes out."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    plain, distributed = ({name: make(seed=1) for name, make in TRAININGS.items()} for _ in range(2))
    parts = {name: training.parts() for name, training in distributed.items()}
    _alone(dcp.load, parts, folder / "distributed")
    for name in TRAININGS:
        plain[name].load(saved[name])
        distributed[name].load_parts(parts[name])
    for way, trainings in (("torch.save", plain), ("torch.distributed.checkpoint", distributed)):
        for training in trainings.values():
            training.run(HALF, 2 * HALF)
        torch.save({name: training.result() for name, training in trainings.items()}, folder / f"{way}.result")


def _alone(call: Callable, parts: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        call(parts, checkpoint_id=folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    second_half(Path(sys.argv[1]))
