"""Seeds and states of the random number generators of Python, numpy and torch.

The seed of the run is kept in the environment, so that processes started later draw the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch

from fabric_core.accelerator_of_torch import accelerator_of_torch
from fabric_core.errors import InvalidArgumentError, InvalidTypeError
from fabric_core.rank_zero import log, rank_from_environment, rank_prefixed_message, rank_zero_only, rank_zero_warn
from fabric_core.settings import GLOBAL_SEED, SEED_WORKERS

_LARGEST = 2**32 - 1  # the most that numpy.random.seed takes


def seed_everything(seed: int | str | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, numpy (if installed) and torch on all devices, and return the seed.

    Args:
        seed: 0 to 2**32 - 1. ``None`` takes the variable ``PL_GLOBAL_SEED``, and 0 with a warning if it is not set.
        workers: whether data loaders set up by Fabric seed their workers too, by ``worker_init_function``.
        verbose: whether to log the seed.

    Raises:
        InvalidArgumentError: the seed is out of range, or the variable is not a whole number.
        InvalidTypeError: the seed is not a whole number.
    """
    seed = _chosen_seed(seed)
    if verbose:
        log.info(rank_prefixed_message(f"Seed set to {seed}", rank_from_environment()), stacklevel=2)
    GLOBAL_SEED.set(seed)
    SEED_WORKERS.set(int(workers))
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def _chosen_seed(seed: int | str | SupportsIndex | None) -> int:
    origin = "seed"
    if seed is None:
        seed, origin = GLOBAL_SEED.integer(), GLOBAL_SEED.name
    if seed is None:
        rank_zero_warn(f"No seed given and {GLOBAL_SEED.name} is not set: using seed 0.", stacklevel=3)
        seed = 0
    try:
        number = int(seed) if isinstance(seed, str) else operator.index(seed)
    except TypeError:
        raise InvalidTypeError(f"seed={seed!r} is not a whole number: use 0 to {_LARGEST}.") from None
    except ValueError:
        raise InvalidArgumentError(f"seed={seed!r} is not a whole number: use 0 to {_LARGEST}.") from None
    if not 0 <= number <= _LARGEST:
        raise InvalidArgumentError(f"{origin}={number} is out of range: use 0 to {_LARGEST}.")
    return number


def reset_seed() -> None:
    """Seed everything again as the last ``seed_everything`` in this or a parent process did; nothing if none did."""
    if GLOBAL_SEED.is_set():
        seed_everything(workers=SEED_WORKERS.flag(), verbose=False)


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Inside the ``with`` block the global CPU generators start from ``seed``; after it they go on as if it never was.

    Unlike ``seed_everything`` it leaves the environment and the generators of other devices alone.
    """
    states = collect_rng_states(include_device=False)
    try:
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if (numpy := _numpy()) is not None:
            numpy.random.seed(seed % (_LARGEST + 1))
        yield
    finally:
        set_rng_states(states)


def worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed this data loader worker so that no two workers of any two ranks draw the same numbers.

    A ``worker_init_fn`` for ``DataLoader``. The same base seed, rank and worker give the same numbers again. The seeds
    are the words of SHA-512 (FIPS 180-4) over base seed, worker and rank: one bit of difference in the input changes
    half of the bits of each seed, and the generators get words of their own.

    Args:
        worker_id: which worker of the loader this is.
        rank: the process that owns the loader, of all processes; ``None`` asks ``rank_zero_only``.
    """
    rank = rank_zero_only.rank if rank is None else rank
    # torch seeds worker n with base + n, where the loader drew the base: equal on all ranks that are seeded alike.
    base = torch.initial_seed() - worker_id
    digest = hashlib.sha512(f"fabric worker seed {base} {worker_id} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    random.seed(digest[8:40])
    if (numpy := _numpy()) is not None:
        numpy.random.seed([int.from_bytes(digest[start : start + 4], "little") for start in range(40, 64, 4)])


def collect_rng_states(include_device: bool = True) -> dict[str, Any]:
    """The states of all generators, for ``set_rng_states``; made of tensors and plain values only.

    Keys: ``torch``, ``python``, ``numpy`` if installed, and, with ``include_device``, ``torch.<device type>`` with one
    state per device if torch has an accelerator that this process uses already. None is initialised for this.
    """
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := _numpy()) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    if include_device and (found := _device_module()) is not None:
        kind, module = found
        get_all = getattr(module, "get_rng_state_all", None)
        states[f"torch.{kind}"] = [module.get_rng_state()] if get_all is None else get_all()
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Put generator states back, also those that went through JSON, which turns tuples into lists.

    Parts that are missing, or belong to a library or a device that is not here, are left alone.
    """
    if "torch" in states:
        torch.set_rng_state(torch.as_tensor(states["torch"], dtype=torch.uint8))
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in states and (numpy := _numpy()) is not None:
        numpy.random.set_state(tuple(states["numpy"]))
    device_states = {key: value for key, value in states.items() if key.startswith("torch.")}
    if device_states and (found := _device_module(initialise=True)) is not None:
        kind, module = found
        _set_device_states(module, device_states.get(f"torch.{kind}", []))


def _set_device_states(module: Any, states: list[torch.Tensor]) -> None:
    if not hasattr(module, "get_rng_state_all"):
        for state in states[:1]:
            module.set_rng_state(state)
        return
    # The states may come from a machine with more devices.
    for index, state in enumerate(states[: module.device_count()]):
        module.set_rng_state(state, index)


def _device_module(initialise: bool = False) -> tuple[str, Any] | None:
    """The kind of accelerator that torch was built for and its module, if the accelerator can be used here.

    Unless ``initialise``, it also must be in use: to ask it otherwise would start it.
    """
    device = accelerator_of_torch()
    if device is None:
        return None
    module = torch.get_device_module(device.type)
    is_initialized = getattr(module, "is_initialized", None)
    usable = initialise or is_initialized is None or is_initialized()
    return (device.type, module) if usable else None


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None
