"""Reading the ``devices`` argument: counts and indices. For accelerators whose devices carry numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fabric_core.errors import InvalidTypeError, MisconfigurationException

EXPECTED = 'a count (2 or "2"), indices ([0, 2] or "0,2"; "1," is the one device with index 1), or all of them (-1)'


def parse_count(devices: object, name: str) -> int:
    """A positive number of processes, from an int or a text of digits; for devices that are not numbered."""
    if isinstance(devices, str) and devices.strip().isdigit():
        devices = int(devices)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise InvalidTypeError(
            f"devices={devices!r} does not fit accelerator={name!r}: expected a whole number of at least 1, "
            f"as in Fabric(accelerator={name!r}, devices=2)."
        )
    return devices


def parse_device_ids(devices: object, available: Sequence[int], name: str) -> list[int]:
    """The indices that ``devices`` selects among ``available``, in the order given."""
    wanted = _requested(devices, available, name)
    if len(set(wanted)) != len(wanted):
        raise MisconfigurationException(f"devices={devices!r} names a device twice: {wanted}. Give each index once.")
    missing = [index for index in wanted if index not in available]
    if missing:
        raise MisconfigurationException(
            f"devices={devices!r} asks for the {name} devices {wanted}, but this machine has "
            f'{list(available) or "none"}. Choose among those, or use devices="auto".'
        )
    return wanted


def _requested(devices: object, available: Sequence[int], name: str) -> list[int]:
    if isinstance(devices, str):
        devices = _from_text(devices.strip(), name)
    if isinstance(devices, bool) or not isinstance(devices, (int, list, tuple)):
        raise _bad_type(devices, name)
    if isinstance(devices, int):
        if devices < -1:
            raise MisconfigurationException(f"devices={devices} is negative. Expected {EXPECTED}.")
        return list(available) if devices == -1 else list(range(devices))
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in devices):
        raise _bad_type(devices, name)
    return list(devices)


def _from_text(text: str, name: str) -> int | list[int]:
    try:
        if "," in text:
            return [int(part) for part in text.strip("[]").split(",") if part.strip()]
        return int(text)
    except ValueError:
        raise MisconfigurationException(f"devices={text!r} cannot be read for {name}. Expected {EXPECTED}.") from None


def _bad_type(devices: object, name: str) -> InvalidTypeError:
    return InvalidTypeError(f"devices={devices!r} ({type(devices).__name__}) does not fit {name}. Expected {EXPECTED}.")
