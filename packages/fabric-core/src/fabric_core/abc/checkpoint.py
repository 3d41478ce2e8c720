"""How a checkpoint's content reaches storage and comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from fabric_core.types import MapLocation, Path


class CheckpointIO(ABC):
    """Writes, reads and removes the checkpoint of one process. It knows nothing of strategies.

    A written checkpoint is complete or absent: whatever fails, what was at ``path`` before is still there.

    Attributes:
        fabric_api: the contract level the class was written for.
    """

    fabric_api: ClassVar[str] = "1"

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``, plain containers and tensors, to ``path``; parent folders are made."""

    @abstractmethod
    def load_checkpoint(
        self, path: Path, map_location: MapLocation = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it back. ``weights_only=None`` means True: no code from the file is run.

        ``FileNotFoundError`` if nothing is there.
        """

    @abstractmethod
    def remove_checkpoint(self, path: Path) -> None:
        """Remove the file or folder; no error if it is absent."""

    def drain(self) -> None:
        """Return once nothing is being written any more; raise what failed in the background.

        An IO whose ``save_checkpoint`` returns earlier than that brings its own. Then all ranks wait for each other
        before they load, and before the processes part.
        """

    def teardown(self) -> None:
        """Finish what is still being written; raise what failed in the background."""
