"""The optimizer's files of all ranks: float32 weights and state, by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fabric_core.checkpoint.conversion.streams import StreamedTensor
from fabric_core.checkpoint.portable import clean_name
from fabric_core.errors import CheckpointError, UnsupportedError
from fabric_deepspeed.checkpoint.files import Scaler
from fabric_deepspeed.checkpoint.partitions import Memory, cut_by_group, cut_each


class OptimizerFiles:
    """What the ranks have written of one optimizer at stages 1 to 3.

    Args:
        contents: of the file of each rank.
        shapes: of the parameters in each flat tensor, as the module's file has them.
        path: for messages.

    Attributes:
        places: where each parameter is.
        why_no_state: why ``state`` is ``None``.
    """

    def __init__(
        self, contents: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, torch.Size]], path: str
    ) -> None:
        self._parts = [content["optimizer_state_dict"] for content in contents]
        self.why_no_state = ""
        first = self._parts[0]
        if "fp32_flat_groups" in first:
            self._flats: Memory = [dict(enumerate(part["fp32_flat_groups"])) for part in self._parts]
            self._bases = [part["optimizer_state_dict"] for part in self._parts]
            _refuse_smaller_groups(first.get("partition_count"), len(contents), path)
            self.places = cut_each(shapes, len(contents))
        elif "single_partition_of_fp32_groups" in first:
            self._flats = [dict(enumerate(part["single_partition_of_fp32_groups"])) for part in self._parts]
            self._bases = [part["base_optimizer_state"] for part in self._parts]
            # Only the last rank's partition may be stored without what fills it up.
            lengths = [flat.numel() for flat in first["single_partition_of_fp32_groups"]]
            self.places = cut_by_group(shapes, first.get("param_alignment_paddings"), lengths, len(contents))
        else:
            raise CheckpointError(f"{path!r} holds no optimizer of DeepSpeed that this version reads.")
        self._check(path)

    def _check(self, path: str) -> None:
        """``CheckpointError`` if the ranks together have not all of a parameter."""
        for name, shape in self.places.shapes.items():
            pieces = self.places.pieces[name]
            there = all(self._flats[one.rank][one.flat].numel() >= one.start + one.length for one in pieces)
            if not there or sum(piece.length for piece in pieces) != shape.numel():
                raise CheckpointError(f"{path!r} is damaged: the files of all ranks hold but a part of {name!r}.")

    @property
    def scaler(self) -> Scaler | None:
        """The state of the loss scaler."""
        found = self._parts[0].get("loss_scaler")
        return found if hasattr(found, "cur_scale") else None

    @cached_property
    def masters(self) -> dict[str, StreamedTensor]:
        """The weights that the optimizer steps, by name."""
        return {name: self.places.stream(name, self._flats) for name in self.places.shapes}

    @cached_property
    def state(self) -> dict[str, Any] | None:
        """``{"state": {name: {...}}, "param_groups": [...]}``."""
        if not all(isinstance(base, Mapping) and "param_groups" in base for base in self._bases):
            self.why_no_state = "it was saved with elastic_checkpoint, which leaves out the options of its groups"
            return None
        groups: list[dict[str, Any]] = []
        state: dict[str, dict[str, Any]] = {}
        for group in self._bases[0]["param_groups"]:
            names = [clean_name(name) for flat in group["params"] for name in self.places.flats[flat]]
            groups.append({**group, "params": names})
            for flat in group["params"]:
                if not self._add(state, flat):
                    return None
        return {"state": state, "param_groups": groups}

    def _add(self, state: dict[str, dict[str, Any]], flat: int) -> bool:
        """Add the state of the parameters in a flat tensor; whether it is of a kind that can be told apart."""
        saved = [base["state"].get(flat, {}) for base in self._bases]
        memory = {key: self._memory(saved, flat, key) for key in saved[0]}
        unknown = [key for key, value in memory.items() if value is None]
        if unknown:
            self.why_no_state = f"{', '.join(map(repr, unknown))} in it is not one number for each of the weights"
            return False
        for name in self.places.flats[flat] if saved[0] else ():
            state[clean_name(name)] = {
                key: self.places.stream(name, value) if isinstance(value, list) else _copied(saved[0][key])
                for key, value in memory.items()
            }
        return True

    def _memory(self, saved: list[Mapping[str, Any]], flat: int, key: str) -> Any:
        """By rank and flat tensor, what is one number for each weight; ``()`` for one value for all of them."""
        values = [one.get(key) for one in saved]
        if not isinstance(values[0], Tensor) or values[0].dim() == 0:
            return ()
        lengths = [flats[flat].numel() for flats in self._flats]
        flats_alike = all(
            isinstance(value, Tensor) and value.dim() == 1 and value.numel() >= length
            for value, length in zip(values, lengths, strict=True)
        )
        return [{flat: value} for value in values] if flats_alike else None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value  # steps are counted up in place


def _refuse_smaller_groups(count: Any, world_size: int, path: str) -> None:
    largest = max(count) if isinstance(count, list) else count
    if largest is not None and largest != world_size:
        raise UnsupportedError(
            f"{path!r} was written by {world_size} ranks that shared the parameters among {largest} of them. Only "
            "DeepSpeed itself reads that: engine.load_checkpoint(...) with the same number of processes."
        )
