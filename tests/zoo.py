"""Small networks with two tasks, what torch itself says of their gradients, and steps that measure alignments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mtlweight import MultiTaskOptimizer, Needs, weighting

SAMPLES = 6
SEED = 5


class TwoTasks(nn.Module):
    """An encoder and a head a task. The encoder may put out one representation for all tasks, or one a task."""

    def __init__(self, encoder: nn.Module, width: int, **heads: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads or {"left": nn.Linear(width, 3), "right": nn.Linear(width, 2)})

    def decode(self, represented: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        each = represented if isinstance(represented, tuple) else [represented] * len(self.heads)
        return {task: head(z) for (task, head), z in zip(self.heads.items(), each, strict=True)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.decode(self.encoder(x))


class Last(nn.Module):
    """The last output of a recurrent network."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0].mean(dim=1)


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(len(x), -1, 2, 6).transpose(1, 2).chunk(3, dim=-1)
        return (
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).mean(dim=1)
        )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Branches(nn.Module):
    """One branch that both tasks use, and one that the task on the right does not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.both(x))
        return z * self.one(x), z


def perceptron(*layers: nn.Module) -> TwoTasks:
    return TwoTasks(nn.Sequential(nn.Linear(5, 4), *layers), 4)


def convolutional() -> TwoTasks:
    convolutions = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2)]
    return TwoTasks(nn.Sequential(*convolutions, nn.BatchNorm2d(4), nn.Flatten()), 4)


def tied() -> TwoTasks:
    """The embedding is used twice: to encode, and as the weight of the head on the left."""
    embedding, left = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    left.weight = embedding.weight
    return TwoTasks(nn.Sequential(embedding, nn.Linear(4, 4), nn.Tanh(), Mean()), 4, left=left, right=nn.Linear(4, 2))


def twice() -> TwoTasks:
    """One layer has two names."""
    layer = nn.Linear(4, 4)
    return perceptron(layer, nn.Tanh(), layer)


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape, dtype=torch.float64)


def words() -> Tensor:
    return torch.randint(0, 7, (SAMPLES, 3))


@dataclass(frozen=True)
class Recipe:
    model: Callable[[], TwoTasks]
    inputs: Callable[[], Tensor]
    channels_last: bool = False


NETWORKS: Mapping[str, Recipe] = {
    "linear": Recipe(perceptron, numbers(5)),
    "convolutions and BatchNorm": Recipe(convolutional, numbers(2, 6, 6)),
    "channels last": Recipe(convolutional, numbers(2, 6, 6), channels_last=True),
    "dropout": Recipe(lambda: perceptron(nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.3)), numbers(5)),
    "LayerNorm": Recipe(lambda: perceptron(nn.LayerNorm(4), nn.GELU()), numbers(5)),
    "embedding": Recipe(lambda: TwoTasks(nn.Sequential(nn.Embedding(7, 4), Mean()), 4), words),
    "GRU": Recipe(lambda: TwoTasks(Last(nn.GRU(4, 3, num_layers=2, batch_first=True)), 3), numbers(3, 4)),
    "LSTM": Recipe(lambda: TwoTasks(Last(nn.LSTM(4, 3, batch_first=True)), 3), numbers(3, 4)),
    "attention": Recipe(lambda: TwoTasks(Attention(need_weights=False), 4), numbers(3, 4)),
    "attention with its weights": Recipe(lambda: TwoTasks(Attention(need_weights=True), 4), numbers(3, 4)),
    "scaled dot product": Recipe(lambda: TwoTasks(ScaledDotProduct(), 4), numbers(3, 4)),
    "transformer layer with dropout": Recipe(
        lambda: TwoTasks(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), Mean()), 4), numbers(3, 4)
    ),
    "tied parameters": Recipe(tied, words),
    "a layer that is used twice": Recipe(twice, numbers(5)),
    "a parameter that one task does not touch": Recipe(lambda: TwoTasks(Branches(), 4), numbers(5)),
}
BAG = Recipe(lambda: TwoTasks(nn.EmbeddingBag(7, 4, mode="sum"), 4), words)
"""No forward derivative and no second one: not for all engines."""


@dataclass
class Problem:
    """A network with a batch and a held-out batch. Two of the same recipe are equal."""

    model: TwoTasks
    x: Tensor
    y: dict[str, Tensor]
    held_out: Tensor
    run: Callable[[Tensor], dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.model

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.model.encoder.parameters())

    @property
    def heads(self) -> list[nn.Parameter]:
        known = {id(p) for p in self.shared}
        return [p for p in self.model.parameters() if id(p) not in known]

    def score(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One loss a task and sample."""
        return {
            "left": (outputs["left"].sin() - self.y["left"]).square().mean(dim=1),
            "right": nn.functional.cross_entropy(outputs["right"], self.y["right"], reduction="none"),
        }

    def sample_losses(self) -> dict[str, Tensor]:
        return self.score(self.run(self.x))

    def task_losses(self) -> dict[str, Tensor]:
        return {task: losses.mean() for task, losses in self.sample_losses().items()}

    def reference(self) -> Tensor:
        """The loss on the left, on the held-out batch."""
        return self.score(self.run(self.held_out))["left"].mean()


def problem(recipe: Recipe, *, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(SEED)
    model = recipe.model()
    x, held_out = recipe.inputs(), recipe.inputs()
    outputs = model.heads["left"].out_features
    y = {"left": torch.randn(SAMPLES, outputs, dtype=torch.float64), "right": torch.randint(0, 2, (SAMPLES,))}
    # Weights that are no multiples of each other, so that no two statistics agree by symmetry.
    for p in model.parameters():
        p.data.uniform_(-1, 1)
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    model.to(device, dtype, memory_format=layout)

    def placed(values: Tensor) -> Tensor:
        # From one float64 draw: a problem in another dtype is the same one, rounded.
        values = values.to(device, dtype) if values.is_floating_point() else values.to(device)
        return values.contiguous(memory_format=layout) if recipe.channels_last and values.ndim == 4 else values

    return Problem(model, placed(x), {task: placed(v) for task, v in y.items()}, placed(held_out))


def flat(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for g, p in pairs])


def gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """One ordinary backward, flat."""
    return flat(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), parameters)


def jacobian(losses: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """One ordinary backward a task."""
    return torch.stack([gradient(loss, parameters) for loss in losses.values()])


def alignment(losses: Mapping[str, Tensor], reference: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """One ordinary backward a task and sample."""
    towards = gradient(reference, parameters)
    rows = [
        torch.stack([gradient(sample, parameters) @ towards for sample in row.reshape(-1)]).reshape(row.shape)
        for row in losses.values()
    ]
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor, rounding: float = 1e-12) -> bool:
    """Equal to rounding, relative to the largest entry."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return bool((found.double() - expected.double()).abs().max() <= rounding * expected.double().abs().max())


class Halve(torch.autograd.Function):
    """Has a second derivative, and no forward one."""

    @staticmethod
    def forward(_ctx, x):
        return x / 2

    @staticmethod
    def backward(_ctx, incoming):
        return incoming / 2


class Halving(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


# One step of an optimizer that measures alignments.

FORMS = {
    "mapping": lambda losses: losses(),
    "tensor": lambda losses: torch.stack([*losses().values()]),
    "callable": lambda losses: losses,
}


@weighting(Needs.ALIGNMENT | Needs.SAMPLES, writes="sample")
def on_samples(view):
    a = view.sample_alignment
    return torch.linspace(-1, 1, a.numel(), dtype=a.dtype, device=a.device).reshape(a.shape)


def optimizer_for(p, by, **options):
    parameters = torch.optim.SGD(p.model.parameters(), lr=0.0)
    return MultiTaskOptimizer(parameters, by, **{"shared": p.model.encoder, "model": p.model, **options})


def combined(p, optimizer, losses, form="callable", main=None):
    """The report of one step. Reference first, then losses, so that dropout draws the masks of the oracle's."""
    torch.manual_seed(SEED)
    reference = p.reference if form == "callable" else p.reference()
    optimizer.combine(FORMS[form](losses), reference=reference if main is None else {main: reference}).backward()
    optimizer.step()
    return optimizer.report


def oracle(p, losses, parameters=None):
    torch.manual_seed(SEED)
    reference = p.reference()
    return alignment(getattr(p, losses)(), reference, p.shared if parameters is None else parameters)


def written(parameters):
    return torch.cat([torch.zeros_like(q).flatten() if q.grad is None else q.grad.flatten() for q in parameters])


def scope_of(p, scope):
    left = dict.fromkeys([*p.shared, *p.model.heads["left"].parameters()])
    return {"shared": p.shared, "main": [*left], "all": [*p.model.parameters()]}[scope]
