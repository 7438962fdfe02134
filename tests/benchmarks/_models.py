"""The models and batches that the benchmarks run on: synthetic data, since only shapes matter for time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES = 10


class MultiTask(nn.Module):
    """An encoder and one classification head a task."""

    def __init__(self, encoder: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.on(self.encoder(x))

    def on(self, features: Tensor) -> list[Tensor]:
        """Each task's logits from the shared features."""
        return [head(features) for head in self.heads]


def lenet(tasks: int) -> MultiTask:
    """The LeNet of Multi-MNIST, for 36 x 36 images."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * 6 * 6, 50),
        nn.ReLU(),
    )
    return MultiTask(
        encoder, [nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, CLASSES)) for _ in range(tasks)]
    )


def mlp(tasks: int, width: int = 512) -> MultiTask:
    encoder = nn.Sequential(
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
    )
    return MultiTask(encoder, [nn.Linear(width, CLASSES) for _ in range(tasks)])


def conv_batchnorm(tasks: int) -> MultiTask:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    encoder = nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(encoder, [nn.Linear(128, CLASSES) for _ in range(tasks)])


class Residual(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.GroupNorm(32, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.GroupNorm(32, out),
        )
        same = stride == 1 and channels == out
        self.around = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet18(tasks: int) -> MultiTask:
    """As for images of 32 x 32; with GroupNorm, so that samples have gradients of their own."""
    blocks = [
        Residual(channels if first else out, out, out // channels if first else 1)
        for channels, out in ((64, 64), (64, 128), (128, 256), (256, 512))
        for first in (True, False)
    ]
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU())
    encoder = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(encoder, [nn.Linear(512, CLASSES) for _ in range(tasks)])


MODELS: dict[str, tuple[Callable[[int], MultiTask], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 36, 36)),
    "MLP 3x512": (mlp, (784,)),
    "conv + BatchNorm": (conv_batchnorm, (3, 32, 32)),
    "ResNet-18": (resnet18, (3, 32, 32)),
}


@dataclass
class Problem:
    """One model with a batch and a held-out batch of the same size."""

    model: MultiTask
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def fresh(self) -> "Problem":
        """The same problem with a model of its own: contestants share neither parameters nor hooks."""
        return Problem(copy.deepcopy(self.model), self.x, self.y, self.held_x, self.held_y)

    @property
    def shared(self) -> list[Tensor]:
        return list(self.model.encoder.parameters())

    def sample_losses(self, logits: list[Tensor] | None = None) -> dict[str, Tensor]:
        """One ``[b]`` loss a task."""
        return self._losses(logits, "none")

    def losses(self, logits: list[Tensor] | None = None) -> dict[str, Tensor]:
        """One scalar a task."""
        return self._losses(logits, "mean")

    def _losses(self, logits: list[Tensor] | None, reduction: str) -> dict[str, Tensor]:
        pairs = zip(self.model(self.x) if logits is None else logits, self.y, strict=True)
        return {str(t): cross_entropy(z, y, reduction=reduction) for t, (z, y) in enumerate(pairs)}

    def reference(self) -> Tensor:
        """The main task's loss on the held-out batch."""
        return cross_entropy(self.model.heads[0](self.model.encoder(self.held_x)), self.held_y)


def problem(name: str, *, tasks: int, samples: int, device: torch.device, seed: int) -> Problem:
    make, shape = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(tasks).to(device)
    x, held_x = torch.randn(2, samples, *shape, generator=generator).to(device).unbind()
    y = torch.randint(CLASSES, (tasks, samples), generator=generator).to(device)
    held_y = torch.randint(CLASSES, (samples,), generator=generator).to(device)
    return Problem(model, x, y, held_x, held_y)
