"""Saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from fabric_core.checkpoint.state import validate_filter
from fabric_core.errors import InvalidTypeError
from fabric_core.facade.base import FabricBase
from fabric_core.wrappers.unwrap import unwrap, unwrap_values

if TYPE_CHECKING:
    from fabric_core.types import Path


class Checkpoints(FabricBase):
    """``save``, ``load`` and ``load_raw``. Every rank calls them."""

    def save(
        self, path: Path, state: dict[str, Any], filter: dict[str, Callable[[str, Any], bool]] | None = None
    ) -> None:
        """Write a checkpoint, complete or not at all. Every rank calls it.

        With ``checkpoint_io="async"`` it returns once the state is copied, and writes the copy in the background. What
        fails there is raised by the next save or load, by ``teardown``, or when the program ends.

        Args:
            path: where to.
            state: modules, optimizers and other objects with ``state_dict``, and plain values, by name.
            filter: for a name in ``state``, which ``(key, value)`` of its state dict to keep.

        Raises:
            TypeError, ValueError: ``state`` or ``filter`` cannot be used; nothing was written.
            CheckpointError: on all ranks, if one of them failed; what was at ``path`` before is still there.
        """
        if not isinstance(state, dict):
            raise InvalidTypeError(
                f"fabric.save() takes a dict of names and objects, not a {type(state).__name__}: "
                '{"model": model, "optimizer": optimizer}.'
            )
        self._require_launch("save")
        if filter is not None:
            validate_filter(state, filter)
        inner = unwrap_values(state)
        if self._strategy.votes_on_saving:
            self._strategy.save_checkpoint(path, inner, filter=filter)
        else:
            self._together(
                f"fabric.save({str(path)!r})", lambda: self._strategy.save_checkpoint(path, inner, filter=filter)
            )
        self._notify("fabric_on_save", path=path, state=state)

    def load(
        self,
        path: Path,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore the objects in ``state`` from a checkpoint, in place. Every rank calls it.

        Args:
            path: where from; a file or a sharded folder, whatever strategy wrote it.
            state: objects by the names they were saved under; plain values are replaced in the dict. Without it, the
                whole checkpoint is returned.
            strict: every name in ``state`` must be in the checkpoint, and modules must match key by key.
            weights_only: ``False`` runs code from the file: only for files you trust.

        Returns:
            What the checkpoint holds beyond ``state``; of a sharded one, what belongs to no module and no optimizer.

        Raises:
            KeyError: names are missing; the message lists all of them, and nothing was changed.
            FileNotFoundError: nothing is at ``path``.
        """
        if state is not None and not isinstance(state, dict):
            raise InvalidTypeError(
                f"fabric.load() takes a dict of names and objects, not a {type(state).__name__}: "
                '{"model": model, "optimizer": optimizer}. For a file with one bare state dict use '
                "fabric.load_raw(path, model)."
            )
        self._require_launch("load")
        self._finish_saves("fabric.load()")
        inner = None if state is None else unwrap_values(state)
        before = dict(inner or {})
        remainder: dict[str, Any] = self._together(
            f"fabric.load({str(path)!r})",
            lambda: self._strategy.load_checkpoint(path, state=inner, strict=strict, weights_only=weights_only),
        )
        if state is not None and inner is not None:
            state.update({name: value for name, value in inner.items() if value is not before[name]})
        self._notify("fabric_on_load", path=path, state=state)
        return remainder

    def load_raw(self, path: Path, obj: Any, strict: bool = True, *, weights_only: bool | None = None) -> None:
        """Load a bare state dict from a file into a module or optimizer, in place. Every rank calls it.

        A sharded checkpoint will do if just one state in it can be meant.

        Raises:
            TypeError: neither a module nor an optimizer.
        """
        inner = unwrap(obj)
        if not isinstance(inner, nn.Module) and not hasattr(inner, "param_groups"):
            raise InvalidTypeError(
                f"fabric.load_raw() takes a module or an optimizer, not a {type(obj).__name__}. For a dict of objects "
                "use fabric.load(path, state)."
            )
        self._require_launch("load_raw")
        self._finish_saves("fabric.load_raw()")
        self._together(
            f"fabric.load_raw({str(path)!r})",
            lambda: self._strategy.load_checkpoint(path, state=inner, strict=strict, weights_only=weights_only),
        )
