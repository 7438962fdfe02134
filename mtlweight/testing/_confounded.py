"""Two tasks whose labels are confounded, with the best predictor in closed form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlweight._errors import MTLWeightError


@dataclass(frozen=True, eq=False)
class ConfoundedTasks:
    """Samples of :func:`confounded_tasks`.

    Args:
        x: ``[n, 2 * factors]``, what a model sees: a rotation of both tasks' factors.
        labels: ``[n]`` of -1 and 1, by task, ``"a"`` and ``"b"``.
        environments: ``[n]``, the index of each sample's environment.
        factors: ``[n, factors]``, by task: what its label, and nothing else, produced.
        means: ``[factors]``, by task: ``μ``, the mean of its factors where the label is 1.
    """

    x: Tensor
    labels: dict[str, Tensor]
    environments: Tensor
    factors: dict[str, Tensor]
    means: dict[str, Tensor]

    def log_odds(self, task: str, agreement: float = 0.5) -> Tensor:
        """The best predictor where both labels agree with this probability: ``log P(Y=1|x) / P(Y=-1|x)``, ``[n]``.

        With ``s`` the same of the other task's factors alone, over 2, and ``m`` the agreement:

            2 <μ, F> + log((m eˢ + (1-m) e⁻ˢ) / ((1-m) eˢ + m e⁻ˢ))

        At ``m = 1/2`` the second term vanishes: that is the causal predictor, of the same accuracy everywhere.
        """
        other = "b" if task == "a" else "a"
        s = self.factors[other] @ self.means[other]
        likely, unlikely = math.log(max(agreement, 1e-300)), math.log(max(1 - agreement, 1e-300))
        shortcut = torch.logaddexp(likely + s, unlikely - s) - torch.logaddexp(unlikely + s, likely - s)
        return 2 * (self.factors[task] @ self.means[task]) + shortcut

    def accuracy(self, task: str, score: Tensor) -> float:
        """The share of samples whose score, ``[n]``, has the sign of the task's label."""
        return (score.sign() == self.labels[task]).double().mean().item()


def confounded_tasks(
    samples: int,
    agreements: Sequence[float],
    *,
    strengths: tuple[float, float] = (1.0, 2.0),
    factors: int = 5,
    seed: int = 0,
    draw: int = 0,
) -> ConfoundedTasks:
    """Two tasks, each with causes of its own, whose labels agree more often than not: a label confounder.

    ``Y_a`` and ``Y_b`` are -1 or 1, balanced, and equal with probability ``m``. Given the labels, the factors
    ``F_a ~ N(Y_a μ_a, I)`` and ``F_b ~ N(Y_b μ_b, I)`` are independent; a model sees a random rotation of both. For a
    model of task ``a``, ``F_b`` is a shortcut: it predicts while ``m`` stays, and misleads when ``m`` moves. The causal
    predictor ``<μ_a, F_a>`` has the accuracy ``Φ(|μ_a|)`` at every ``m``.

    Args:
        samples: in each environment.
        agreements: ``m`` in each environment.
        strengths: ``|μ_a|`` and ``|μ_b|``. By default task ``b`` is the easier one, so that its causes tempt.
        factors: of each task.
        seed: of rotation and means: environments of one problem have the same.
        draw: which samples; another number gives other samples of the same problem.

    Raises:
        MTLWeightError: if an agreement is not a probability, or there is no environment.

    >>> from mtlweight.testing import confounded_tasks
    >>> test = confounded_tasks(20_000, [0.05])
    >>> round(test.accuracy("a", test.log_odds("a")), 2), round(test.accuracy("a", test.log_odds("a", 0.95)), 2)
    (0.84, 0.39)
    """
    if not agreements or not all(0 <= m <= 1 for m in agreements):
        raise MTLWeightError(
            f"confounded_tasks: expected at least one agreement, each from 0 to 1; found {list(agreements)}. Pass the "
            "probability that both labels are equal in each environment."
        )
    fixed = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, factors, generator=fixed)
    sizes = torch.tensor(strengths)[:, None]
    mean_a, mean_b = (sizes * torch.nn.functional.normalize(directions, dim=1)).unbind()
    rotation = torch.linalg.qr(torch.randn(2 * factors, 2 * factors, generator=fixed))[0]
    random = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + (draw + 1) * 0xD1342543DE82EF95) % (1 << 63))
    n = samples * len(agreements)
    environments = torch.arange(len(agreements)).repeat_interleave(samples)
    y_a = 2.0 * torch.randint(2, (n,), generator=random) - 1
    agrees = torch.rand(n, generator=random) < torch.tensor(list(agreements), dtype=torch.float32)[environments]
    y_b = torch.where(agrees, y_a, -y_a)
    noise_a, noise_b = torch.randn(2, n, factors, generator=random).unbind()
    f_a, f_b = y_a[:, None] * mean_a + noise_a, y_b[:, None] * mean_b + noise_b
    return ConfoundedTasks(
        x=torch.cat([f_a, f_b], dim=1) @ rotation.T,
        labels={"a": y_a, "b": y_b},
        environments=environments,
        factors={"a": f_a, "b": f_b},
        means={"a": mean_a, "b": mean_b},
    )
