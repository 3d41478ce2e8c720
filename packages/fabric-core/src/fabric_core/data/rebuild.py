"""Constructing a loader again with another sampler."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from fabric_core.data.capture import construction_of
from fabric_core.data.construction import OPT_OUT, Call, call_of, copy_changes, parameters_of
from fabric_core.data.lengths import has_iterable_dataset
from fabric_core.errors import InvalidTypeError, MisconfigurationException
from fabric_core.rank_zero import rank_zero_only
from fabric_core.warnings import possible_user_warning

# Arguments that depend on each other: whoever brings a sampler decides on all of them.
_SAMPLING = ("sampler", "batch_sampler", "shuffle")


def reinstantiate(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """A new loader of the same class, equal in everything but drawing its indices from ``sampler``.

    The constructor gets the arguments noted by ``capture_constructors``, otherwise the loader's attributes of the same
    names. Attributes set after construction are set again. A batch sampler of the user's is constructed again around
    ``sampler``. For an ``IterableDataset`` the sampler is ignored. The given loader stays as it was.

    Raises:
        InvalidTypeError: the loader's or batch sampler's constructor has no parameter for the sampler.
        MisconfigurationException: arguments of the constructor are unknown, or contradict the sampler.
    """
    if not isinstance(loader, DataLoader):
        raise InvalidTypeError(f"Expected a torch.utils.data.DataLoader, got {type(loader).__name__}.")
    if has_iterable_dataset(loader):
        call = call_of(loader, ignore=("sampler", "batch_sampler"))
    else:
        wanted = _sampling_arguments(loader, sampler)
        call = call_of(loader, ignore=wanted)
        call.replace(wanted)
    new: DataLoader[Any] = call.make()
    copy_changes(loader, new, ignore=_SAMPLING)
    if not has_iterable_dataset(loader):
        _warn_if_unused(new, sampler)
    return new


def index_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler of indices that the loader's batches come from, also within a batch sampler of the user's."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    return loader.sampler if inner is None else inner


def _sampling_arguments(loader: DataLoader[Any], sampler: Any) -> dict[str, Any]:
    batch_sampler: Any = loader.batch_sampler
    # A loader with a batch size made its batch sampler itself; so did one whose constructor does not take any.
    if batch_sampler is None or loader.batch_size is not None or not _takes(type(loader), "batch_sampler"):
        return {"sampler": sampler, "batch_sampler": None, "shuffle": False}
    if type(batch_sampler) is BatchSampler:
        batching = {"batch_size": batch_sampler.batch_size, "drop_last": batch_sampler.drop_last}
        return {"sampler": sampler, "batch_sampler": None, "shuffle": False, **batching}
    new = _rebuild_batch_sampler(batch_sampler, sampler)
    return {"sampler": None, "batch_sampler": new, "shuffle": False, "batch_size": 1, "drop_last": False}


def _rebuild_batch_sampler(batch_sampler: Any, sampler: Any) -> Any:
    cls = type(batch_sampler)
    if construction_of(batch_sampler) is not None or _takes(cls, "sampler"):
        try:
            call = call_of(batch_sampler, ignore=("sampler",))
        except MisconfigurationException as error:
            return _from_batch_size(batch_sampler, sampler, error)
        call.replace({"sampler": sampler})
        new = call.make()
        copy_changes(batch_sampler, new, ignore=("sampler",))
        return new
    return _from_batch_size(batch_sampler, sampler)


def _takes(cls: type, name: str) -> bool:
    return name in parameters_of(cls)[0]


def _from_batch_size(batch_sampler: Any, sampler: Any, unknown: Exception | None = None) -> Any:
    """Try the three arguments of torch's BatchSampler on a class that has at least their attributes."""
    cls = type(batch_sampler)
    if not (hasattr(batch_sampler, "batch_size") and hasattr(batch_sampler, "drop_last")):
        raise unknown or _no_batch_sampler(cls, "it has no attributes `batch_size` and `drop_last`")
    try:
        new = Call(cls, [sampler, batch_sampler.batch_size, batch_sampler.drop_last]).make()
    except TypeError as error:
        raise _no_batch_sampler(cls, f"(sampler, batch_size, drop_last) does not suit its __init__: {error}") from error
    copy_changes(batch_sampler, new, ignore=("sampler",))
    return new


def _no_batch_sampler(cls: type, reason: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"The batch sampler {cls.__name__} cannot be constructed again with a sampler of Fabric's: {reason}. Derive it "
        "from torch.utils.data.BatchSampler with a parameter `sampler` and construct it after `fabric.launch()`, or "
        f"{OPT_OUT}."
    )


def _warn_if_unused(loader: DataLoader[Any], sampler: Any) -> None:
    if loader.sampler is not sampler and index_sampler(loader) is not sampler and rank_zero_only.rank == 0:
        possible_user_warning(
            f"{type(loader).__name__} took the sampler that divides the data among the ranks, but does not seem to use "
            f"it: every rank may see the same data. Hand `sampler` to the parent's __init__, or {OPT_OUT}.",
            stacklevel=3,
        )
