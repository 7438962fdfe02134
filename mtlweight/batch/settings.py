"""What is fixed for an optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from mtlweight._view import View
from mtlweight._weighting import Level, Weighting
from mtlweight.batch.parameters import called
from mtlweight.distributed.processes import Processes
from mtlweight.engines import ALIGNMENTS, GRADIENTS
from mtlweight.engines.features import Capture

Penalty: TypeAlias = Callable[[Mapping[str, Tensor], View, Any], Tensor]
"""From the losses with their graph, the view for notes, and ``environments``, to a scalar that is added to the step."""


@dataclass(frozen=True)
class Settings:
    """The arguments of a ``MultiTaskOptimizer``, under the same names.

    ``capture`` records the shared representation for the features engine.
    """

    optimizer: Optimizer
    weighting: Weighting
    shared: list[nn.Module | Tensor] | None
    model: nn.Module | None
    engine: str
    heads: str
    on_nonfinite: str
    penalty: Penalty | None
    outer: list[nn.Module | Tensor]
    processes: Processes | None
    capture: Capture | None = None

    @property
    def name(self) -> str:
        """What messages call the weighting."""
        text = repr(self.weighting)
        return text if hasattr(self.weighting, "parts") else text.split("(")[0]

    @property
    def writes(self) -> Level:
        """The level of the weights."""
        return self.weighting.writes

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that the user named: the model, or else the shared ones."""
        shared = [part for part in self.shared or [] if isinstance(part, nn.Module)]
        return shared if self.model is None else [self.model]

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters, frozen ones too."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def called(self, parameter: Tensor) -> str:
        """What messages call a parameter."""
        return called(parameter, self.modules, self.optimizer.param_groups)

    @property
    def gradient_engine(self) -> str:
        """The engine for Jacobians and Gramians: ``rows`` unless another one was named."""
        return self.engine if self.engine in GRADIENTS else "rows"

    @property
    def alignment_engine(self) -> str:
        """The engine for alignments; ``auto`` is ``forward`` where it can run, else ``pullback``."""
        return self.engine if self.engine in ("forward", *ALIGNMENTS) else "auto"

    @property
    def no_objective(self) -> str | None:
        """What makes the step the gradient of no one objective, if anything does."""
        if self.writes == "entry":
            return "weights per gradient entry"
        return "heads='unweighted'" if self.heads == "unweighted" else "outer=..." if self.outer else None
