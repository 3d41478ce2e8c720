"""A layout that core does not know, and the plugin that reads it: one file of numbers for each tensor, and a list."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from fabric_core.abc.hooks import hookimpl
from fabric_core.checkpoint.conversion.streams import StreamedTensor
from fabric_core.checkpoint.folder_commit import FolderLayout
from fabric_core.checkpoint.foreign import Origin
from fabric_core.errors import UnsafeCheckpointError

LIST = "notes.json"
LAYOUT = FolderLayout(marker=LIST, held=LIST, is_part=lambda name: name == LIST or name.endswith(".bin"))


def write_notes(folder: Any, state: dict[str, Any], **values: Any) -> None:
    """Modules' and optimizers' states by name, as nested dicts of tensors and plain values; and other values."""
    os.makedirs(folder, exist_ok=True)
    numbers: dict[int, str] = {}

    def note(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = numbers.setdefault(value.data_ptr(), f"{len(numbers)}.bin")
            with open(os.path.join(folder, name), "wb") as file:
                file.write(value.detach().contiguous().float().numpy().tobytes())
            return {"file": name, "shape": list(value.shape)}
        if isinstance(value, dict):
            return {key: note(child) for key, child in value.items()}
        return [note(child) for child in value] if isinstance(value, list) else value

    with open(os.path.join(folder, LIST), "w", encoding="utf-8") as file:
        json.dump({"state": note(state), "values": values}, file)


class NotesReader:
    format = "notes"
    layout = LAYOUT

    def origin(self, path: str) -> Origin:
        return Origin("Notes 1.0", 3)

    def __call__(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        with open(os.path.join(path, LIST), encoding="utf-8") as file:
            content = json.load(file)
        if content["values"].get("code") and weights_only is not False:
            raise UnsafeCheckpointError("It holds code. Pass weights_only=False.")
        streams: dict[str, StreamedTensor] = {}

        def found(value: Any) -> Any:
            if isinstance(value, dict) and "file" in value:
                return streams.setdefault(value["file"], _stream(os.path.join(path, value["file"]), value["shape"]))
            if isinstance(value, dict):
                return {key: found(child) for key, child in value.items()}
            return [found(child) for child in value] if isinstance(value, list) else value

        return {**found(content["state"]), **content["values"]}


def _stream(file: str, shape: list[int]) -> StreamedTensor:
    def pieces() -> Any:
        with open(file, "rb") as opened:
            while part := opened.read(12):  # three numbers at a time
                yield torch.frombuffer(bytearray(part), dtype=torch.float32)

    return StreamedTensor(torch.Size(shape), torch.float32, pieces)


class NotesPlugin:
    """Its hook module."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @hookimpl
    def fabric_checkpoint_reader(self, path: str) -> Any:
        self.asked.append(path)
        return NotesReader() if os.path.exists(os.path.join(path, LIST)) else None
