"""What brings the processes of a job to life."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar


class Launcher(ABC):
    """Starts the processes of this node and runs a function in each.

    Attributes:
        requires_function: ``Fabric.launch()`` must be given a function, because the calling process is not a rank.
        is_interactive_compatible: works in notebooks and at the Python prompt.
    """

    requires_function: ClassVar[bool] = False
    is_interactive_compatible: ClassVar[bool] = False

    @abstractmethod
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function(*args, **kwargs)`` in every process; return rank 0's result.

        If a process fails, the others are ended within a second, and ``WorkerFailedError`` or the failure itself
        reaches the caller with the first failure's traceback, rank and host.
        """
