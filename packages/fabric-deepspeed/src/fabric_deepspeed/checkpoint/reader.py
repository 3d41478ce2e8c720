"""The reader that core asks for: DeepSpeed's checkpoints under every strategy, and on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric_deepspeed.checkpoint.layout import LAYOUT

if TYPE_CHECKING:
    from fabric_core.checkpoint.foreign import Origin


class DeepSpeedReader:
    """Reads the folder that DeepSpeed writes, as ``fabric_core.checkpoint.foreign`` says."""

    format = "deepspeed"
    layout = LAYOUT

    def __call__(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        """Float32 weights, the optimizer's state by names, and the rest of what the user saved, by the user's names.

        Checkpoints that were not written by Fabric have none: the module is ``"model"``, its optimizer ``"optimizer"``.
        """
        from fabric_deepspeed.checkpoint.saved import SavedEngine

        return SavedEngine(path, weights_only).content()

    def origin(self, path: str) -> Origin:
        """DeepSpeed's release, as the files have it, and how many ranks wrote them."""
        from fabric_core.checkpoint.foreign import Origin
        from fabric_deepspeed.checkpoint.saved import SavedEngine

        saved = SavedEngine(path, weights_only=True)
        return Origin(saved.written_by, saved.world_size)
