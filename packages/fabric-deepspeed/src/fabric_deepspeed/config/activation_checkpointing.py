"""How activations are kept where the model calls ``deepspeed.checkpointing.checkpoint``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import Path
from fabric_deepspeed.config.section import Section, switch, whole


@dataclass(frozen=True)
class ActivationCheckpointingConfig(Section):
    """The section ``activation_checkpointing``. It changes nothing in a model that checkpoints in another way.

    Attributes:
        partition_activations: split what is kept over the ranks that compute the same.
        cpu_checkpointing: keep it in host memory.
        contiguous_memory_optimization: copy it into one buffer; needs the first switch and ``number_checkpoints``.
        synchronize_checkpoint_boundary: wait for the device at each checkpoint.
        number_checkpoints: how many checkpoints a forward makes.
    """

    path: ClassVar[Path] = ("activation_checkpointing",)

    partition_activations: bool = switch(False)
    cpu_checkpointing: bool = switch(False)
    contiguous_memory_optimization: bool = switch(False)
    synchronize_checkpoint_boundary: bool = switch(False)
    number_checkpoints: int | None = whole(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contiguous_memory_optimization:
            return
        if not self.partition_activations:
            raise InvalidArgumentError(
                f"{self.place('contiguous_memory_optimization')}=True works on partitioned activations only: add "
                "partition_activations=True."
            )
        if self.number_checkpoints is None:
            raise InvalidArgumentError(
                f"{self.place('contiguous_memory_optimization')}=True needs to know how many checkpoints a forward "
                'makes: add config={"activation_checkpointing": {"number_checkpoints": ...}}.'
            )
