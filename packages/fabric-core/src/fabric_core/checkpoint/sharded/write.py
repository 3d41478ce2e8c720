"""Writing a sharded checkpoint: every rank its part, complete or absent."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch

from fabric_core.checkpoint.sharded.draft import Draft, begin_draft, join_draft
from fabric_core.checkpoint.sharded.layout import DATA_SUFFIX, EXTRAS, METADATA
from fabric_core.checkpoint.sharded.manifest import FileRecord, Manifest, fabric_version, with_generation
from fabric_core.errors import CheckpointError

if TYPE_CHECKING:
    from fabric_core.checkpoint.sharded.index import Place
    from fabric_core.checkpoint.sharded.ranks import Ranks
    from fabric_core.types import Path

T = TypeVar("T")


def write_sharded(
    path: Path, tensors: Mapping[str, Any], extras: Mapping[str, Any], ranks: Ranks, values: Iterable[str] = ()
) -> None:
    """Write a checkpoint of all ranks to ``path``, complete or not at all. Every rank of ``ranks`` calls it.

    What was at ``path`` before stays until everything is written, and is then replaced in one step. The folder is one
    that ``torch.distributed.checkpoint.load`` reads.

    Args:
        path: a local folder that all ranks see, or a URL; rank 0's counts, relative to where rank 0 runs.
        tensors: nested dicts by name; leaves are DTensors, of which each rank writes its part, tensors and plain
            values, which must be equal on all ranks and are written once.
        extras: what else there is; rank 0's is stored.
        ranks: who writes.
        values: the names in ``tensors`` that are of no module and no optimizer; a load returns them unasked.

    Raises:
        IsADirectoryError: on all ranks; a folder is at ``path`` that holds other things than a checkpoint. Nothing
            was written.
        CheckpointError: on all ranks, if writing failed on one; names that rank. The rank itself raises its own error.
    """
    save = _Save(path, tensors, extras, ranks, tuple(values))
    try:
        save.run()
    except BaseException:
        save.discard()
        raise
    finally:
        save.close()


@dataclass(frozen=True)
class _Failure:
    """That a rank has failed, for the others. What the file system refuses is the same error on all of them."""

    rank: int
    error: str
    refusal: OSError | None = None


@dataclass(frozen=True)
class _Written:
    """What a rank has written: where its pieces are, and its files."""

    places: dict[Any, Place] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


class _Save:
    """One rank's part in a save. What the ranks exchange is an answer or a ``_Failure``, so that none waits in vain."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Any],
        extras: Mapping[str, Any],
        ranks: Ranks,
        values: tuple[str, ...],
    ) -> None:
        self._path, self._tensors, self._extras, self._ranks, self._values = path, tensors, extras, ranks, values
        self._draft: Draft | None = None
        self._error: Exception | None = None
        self._metadata: Any = None

    def run(self) -> None:
        """The save in three rounds: begin the draft, divide the work, write and publish."""
        ranks = self._ranks
        begun: Any = self._attempt(self._begin) if ranks.rank == 0 else None
        if isinstance(begun, _Failure) and isinstance(self._error, OSError):
            begun = replace(begun, refusal=self._error)
        address = self._settled(ranks.broadcast(begun))
        plans = ranks.collect(self._attempt(lambda: self._local_plan(address)))
        plan = self._settled(ranks.hand_out(self._divided(plans)))
        written = ranks.collect(self._attempt(lambda: self._write(plan)))
        self._settled(ranks.broadcast(self._published(written)))

    def discard(self) -> None:
        """Remove what was written, unless it is published. Rank 0 does so before it tells the others of a failure."""
        if self._draft is not None and self._ranks.rank == 0:
            self._draft.discard()

    def close(self) -> None:
        """Let go of the draft; and of the error, which refers to this object and would keep the state alive."""
        self._error = None
        if self._draft is not None:
            self._draft.close()

    def _begin(self) -> tuple[str, str]:
        self._draft = begin_draft(self._path)
        return self._draft.address

    def _local_plan(self, address: tuple[str, str]) -> Any:
        from fabric_core.checkpoint.sharded.planning import Planner

        if self._draft is None:
            self._draft = join_draft(address)
        self._planner = Planner(self._tensors, is_first=self._ranks.rank == 0)
        return self._planner.local()

    def _divided(self, plans: list[Any] | None) -> list[Any] | None:
        """Rank 0: what each rank is to write, or why none is to; ``None`` elsewhere."""
        if plans is None:
            return None
        answer: Any = _first_failure(plans) or self._attempt(lambda: self._planner.together(plans))
        if isinstance(answer, _Failure):
            self.discard()
            return [answer] * len(plans)
        divided, self._metadata = answer
        return list(divided)

    def _write(self, plan: Any) -> _Written:
        assert self._draft is not None
        files: dict[str, FileRecord] = {}
        if self._ranks.rank == 0:
            files |= self._write_extras()
        name = with_generation(f"__{self._ranks.rank}_0{DATA_SUFFIX}", self._draft.generation)
        with self._explained():
            places = self._planner.write(plan, self._draft.create, name, files)
        return _Written(places, files)

    def _write_extras(self) -> dict[str, FileRecord]:
        assert self._draft is not None
        name = with_generation(EXTRAS, self._draft.generation)
        with self._draft.create(name) as file, self._explained():
            torch.save(dict(self._extras), cast("IO[bytes]", file))
        return {name: file.record()}

    def _published(self, written: list[Any] | None) -> Any:
        """Rank 0: publish if all ranks have written; ``None`` or the failure."""
        if written is None:
            return None
        failure = _first_failure(written) or self._attempt(lambda: self._publish(written))
        if failure is not None:
            self.discard()
        return failure

    def _publish(self, written: list[_Written]) -> None:
        from fabric_core.checkpoint.sharded.planning import dump_metadata

        assert self._draft is not None
        places = {index: place for one in written for index, place in one.places.items()}
        files = {name: record for one in written for name, record in one.files.items()}
        name = with_generation(METADATA, self._draft.generation)
        with self._draft.create(name) as file:
            file.write(dump_metadata(self._metadata, places))
        files[name] = file.record()
        self._draft.publish(
            Manifest(
                files=files,
                world_size=self._ranks.size,
                torch=str(torch.__version__),
                fabric=fabric_version(),
                generation=self._draft.generation,
                values=self._values,
            )
        )

    def _attempt(self, action: Callable[[], T]) -> T | _Failure:
        """What ``action`` returns, or the failure, which is remembered. An interrupt goes through: others notice."""
        try:
            return action()
        except Exception as error:
            self._error = error
            return _Failure(self._ranks.rank, f"{type(error).__name__}: {error}")

    def _settled(self, answer: T | _Failure) -> T:
        """The answer that all ranks have; if it is a failure, the error that belongs to it."""
        if not isinstance(answer, _Failure):
            return answer
        if self._error is not None:
            raise self._error
        if answer.refusal is not None:
            raise answer.refusal
        raise CheckpointError(
            f"The checkpoint {os.fspath(self._path)!r} was not written, because rank {answer.rank} failed: "
            f"{answer.error}"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"The state for {os.fspath(self._path)!r} cannot be written: {error}. Store plain values and state "
                "dicts."
            ) from error


def _first_failure(answers: list[Any]) -> _Failure | None:
    return next((answer for answer in answers if isinstance(answer, _Failure)), None)
