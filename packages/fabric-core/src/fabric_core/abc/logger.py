"""Where metrics go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class Logger(ABC):
    """Receives scalars and hyper-parameters. Implementations write on rank 0 only.

    Attributes:
        fabric_api: the contract level the class was written for.
    """

    fabric_api: ClassVar[str] = "1"

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Version of the experiment."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record scalars; ``step`` counts by itself if not given."""

    @abstractmethod
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Record hyper-parameters."""

    @property
    def root_dir(self) -> str | None:
        """Folder of all versions, if the logger writes files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Folder of this version, if the logger writes files."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between the parts of a metric's name."""
        return "/"

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Record the model's graph, if the logger can."""

    def save(self) -> None:
        """Write what is buffered."""

    def finalize(self, status: str) -> None:
        """The run is over; ``status`` is "success" or "failed"."""
        self.save()
