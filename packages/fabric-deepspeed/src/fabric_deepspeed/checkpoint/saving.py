"""Writing a checkpoint in DeepSpeed's layout, all at once or not at all.

DeepSpeed's own save writes file by file into the place itself, and when one rank fails, the others wait for it. So the
engine is asked for its checkpoint while an object that only takes notes is in the place of what writes; then every rank
writes what it was to write into a draft, and core publishes that.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from fabric_core.checkpoint.folder_commit import commit_folder
from fabric_core.errors import CheckpointError, UnsupportedError, UsageError
from fabric_deepspeed.backend import kept_elsewhere
from fabric_deepspeed.checkpoint.layout import LAYOUT, TAG
from fabric_deepspeed.checkpoint.live import flat_optimizer, names_of
from fabric_deepspeed.checkpoint.saved import ENTRY, FORMAT
from fabric_deepspeed.checkpoint.swapped import frozen_part
from fabric_deepspeed.engine import Engine

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path
    from fabric_deepspeed.checkpoint.named import NamedEngine


class EngineFiles:
    """What one rank is to write: the content by file, and the programs that go beside it. Tensors are the live ones.

    Collecting it is for all ranks together, and writes nothing.

    Args:
        engine: the engine.
        exclude_frozen_parameters: leave out parameters that no optimizer holds.
    """

    def __init__(self, engine: Engine, exclude_frozen_parameters: bool = False) -> None:
        refuse_other_writers(engine)
        refuse_added_groups(engine)
        self._engine = engine
        with _noting(engine) as notes:
            engine.save_checkpoint(
                _PLACE, tag=TAG, save_latest=False, exclude_frozen_parameters=exclude_frozen_parameters
            )
        self.contents = {os.path.relpath(path, _PLACE): content for path, content in notes.contents.items()}
        self._programs = notes.programs
        for content in self.models:
            _add_optimizer(engine, content)
            if content.get("frozen_param_fragments"):
                content["frozen_param_fragments"] = _frozen_parts(engine, content["frozen_param_fragments"])
        for content in self.contents.values():
            if "optimizer_state_dict" in content and engine.zero_nvme_offload_optimizer():
                content["optimizer_state_dict"] = _with_files(engine, content["optimizer_state_dict"])

    @property
    def models(self) -> list[dict[str, Any]]:
        """The contents that hold the module: one, or none on a rank that writes none of it."""
        return [content for content in self.contents.values() if "module" in content]

    def add_values(self, named: NamedEngine, values: Mapping[str, Any]) -> None:
        """Add what the user wants stored beside the engine, readable as DeepSpeed's client state.

        Names that DeepSpeed has itself go into Fabric's entry, which also says by which names the user knows the rest.
        """
        for content in self.models:
            taken = {key: value for key, value in values.items() if key in content or key == ENTRY}
            free = {key: value for key, value in values.items() if key not in taken}
            entry = {"format": FORMAT, "module": named.module, "optimizer": named.optimizer, "keys": list(free)}
            content.update(free)
            content[ENTRY] = {**entry, "values": taken, "parameters": _names_in_order(self._engine)}

    def drop(self, names: set[str]) -> None:
        """Leave these entries of the module's state out."""
        for content in self.models:
            for key in ("module", "frozen_param_shapes", "frozen_param_fragments"):
                if content.get(key):
                    content[key] = _without(content[key], names)
            content["buffer_names"] = [name for name in content.get("buffer_names") or () if name not in names]

    def write(self, folder: str) -> None:
        """Write this rank's files into the draft. ``OSError`` as the system says."""
        archive = bool(getattr(self._engine.checkpoint_engine, "zipfile_serialization", True))
        os.makedirs(os.path.join(folder, TAG), exist_ok=True)
        for name, content in self.contents.items():
            _write_file(content, os.path.join(folder, name), archive)
        if self._programs is not None:
            self._programs(folder)


def write_engine(path: Path, files: EngineFiles, ranks: Ranks) -> None:
    """Make what all ranks have collected the checkpoint ``path``. Raises as ``commit_folder`` does."""
    commit_folder(path, files.write, TAG.encode(), LAYOUT, ranks)


def refuse_other_writers(engine: Engine) -> None:
    """``UnsupportedError`` if the engine was told to write in a way that cannot be made all or nothing."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    if type(engine.checkpoint_engine) is not TorchCheckpointEngine:
        raise UnsupportedError(
            f"DeepSpeed's config chooses {type(engine.checkpoint_engine).__name__} to write checkpoints, which puts "
            "files in their place by itself. Fabric writes them beside it first, so that a save that fails leaves "
            'nothing: remove "writer" from the "checkpoint" section, and "datastates_ckpt".'
        )


def refuse_added_groups(engine: Engine) -> None:
    """``RuntimeError`` if the optimizer has got parameters since set-up that are none of the module's."""
    optimizer = engine.optimizer
    if optimizer is None or optimizer is not engine.basic_optimizer:  # no group can be added
        return
    own = names_of(engine)
    if any(parameter not in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "optimizer.add_param_group(...) added parameters after fabric.setup(...) that are none of the model's. "
            "DeepSpeed does not average their gradients, and a checkpoint would hold no values of them, so nothing was "
            "saved. Make them part of the model and of its optimizer before fabric.setup(model, optimizer)."
        )


_PLACE: Final = os.path.abspath(os.path.join(os.sep, "checkpoint"))
"""Where the engine is told to write. Nothing is written there."""


class _Notes:
    """In the place of the engine's writer: remembers what was to be written where, and creates nothing."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.contents: dict[str, dict[str, Any]] = {}
        self.programs: Callable[[str], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)  # what it can do and what it was set to

    def save(self, state_dict: Any, path: Any) -> None:
        self.contents[os.fspath(path)] = state_dict

    def makedirs(self, *_: Any, **__: Any) -> None: ...

    def create(self, *_: Any) -> None: ...

    def commit(self, *_: Any) -> bool:
        return True


@contextmanager
def _noting(engine: Engine) -> Iterator[_Notes]:
    writer, copy_programs = engine.checkpoint_engine, getattr(engine, "_copy_recovery_script", None)
    if copy_programs is None:
        raise kept_elsewhere("the copying of its recovery programs")
    notes = _Notes(writer)

    def copy_later(_: str) -> None:
        notes.programs = copy_programs

    engine.checkpoint_engine = notes
    engine._copy_recovery_script = copy_later
    engine.zero_nvme_offload_optimizer = _copies_no_files
    try:
        yield notes
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script, engine.zero_nvme_offload_optimizer


def _copies_no_files() -> bool:
    """DeepSpeed copies what is on NVMe into the checkpoint's place by itself; here it is written with the rest."""
    return False


def _frozen_parts(engine: Engine, parts: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: parameter for parameter, name in engine.param_names.items()}
    return {name: frozen_part(own[name], part) for name, part in parts.items()}


def _with_files(engine: Engine, content: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state, with maps of its files in the places of tensors that are on NVMe, and empty."""
    optimizer = flat_optimizer(engine)
    assert optimizer is not None
    flats, numbers = content["fp32_flat_groups"], [number for group in optimizer.flats_of for number in group]
    packed = content["optimizer_state_dict"]
    state = {index: {**entry, **optimizer.state(numbers[index])} for index, entry in packed["state"].items()}
    return {
        **content,
        "fp32_flat_groups": [optimizer.weights(number) for number in range(len(flats))],
        "optimizer_state_dict": {**packed, "state": state},
    }


def _write_file(content: Any, path: str, archive: bool) -> None:
    with open(path, "xb") as file:
        try:
            torch.save(content, file, _use_new_zipfile_serialization=archive)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"The state cannot be written to {os.path.basename(path)!r}: {error}. Store plain values and state "
                "dicts."
            ) from error
        except RuntimeError as error:
            # torch reports a failed write as a position that does not add up; the reason is further back.
            reason = _system_error_behind(error)
            if reason is None:
                raise
            raise OSError(reason.errno, reason.strerror, path) from error


def _system_error_behind(error: BaseException) -> OSError | None:
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


def _add_optimizer(engine: Engine, content: dict[str, Any]) -> None:
    """The state of an optimizer without partitions, which releases before 0.19 leave out in bfloat16."""
    optimizer = engine.optimizer
    if content.get("optimizer") is None and optimizer is not None and not hasattr(optimizer, "dp_process_group"):
        content["optimizer"] = optimizer.state_dict()


def _without(source: Mapping[str, Any], names: set[str]) -> Any:
    kept = type(source)((key, value) for key, value in source.items() if key not in names)  # type: ignore[call-arg]
    if hasattr(source, "_metadata"):  # version numbers that modules read when loading
        kept._metadata = source._metadata  # type: ignore[attr-defined]
    return kept


def _names_in_order(engine: Engine) -> list[str] | None:
    """The optimizer's parameters in the order of its numbers, where it numbers them; ``None`` where it has no names."""
    optimizer = engine.optimizer
    if optimizer is None or optimizer is not engine.basic_optimizer:
        return None
    names = names_of(engine)
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
