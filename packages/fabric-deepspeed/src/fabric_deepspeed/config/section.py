"""The base of the typed sections: fields that know which values can work, and in which form DeepSpeed takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, TypeVar

from fabric_core.errors import InvalidArgumentError
from fabric_deepspeed.config.keywords import Path, dotted

Own = TypeVar("Own", bound="Section")
STAGES: Final = (0, 1, 2, 3)


@dataclass(frozen=True)
class Section:
    """One section of DeepSpeed's dictionary. Fields have DeepSpeed's names.

    ``InvalidArgumentError`` at once for a value that cannot work; numbers such as ``2e8`` become whole. What is given
    as ``None`` is left to DeepSpeed.
    """

    path: ClassVar[Path]
    required: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.name in self.required:
                object.__setattr__(self, one.name, self._read(one.name, value, one.metadata))

    def _read(self, name: str, value: Any, expected: Mapping[str, Any]) -> Any:
        try:
            return expected["read"](value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidArgumentError(f"{self.place(name)}={value!r}: expected {expected['words']}.") from None

    @classmethod
    def place(cls, name: str) -> str:
        """How a message calls a field."""
        return dotted((*cls.path, name))

    @classmethod
    def of(cls: type[Own], values: Mapping[str, Any]) -> Own:
        """The section with what ``values`` says; keys that this class does not know are left out."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def section(self) -> dict[str, Any]:
        """The section as DeepSpeed takes it: a new dictionary of plain values."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: plain(value) for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """A nested section as dictionary, anything else as it is."""
    return value.section() if isinstance(value, Section) else value


def check(words: str, read: Callable[[Any], Any], stages: tuple[int, ...] = STAGES) -> dict[str, Any]:
    """What a field needs as ``metadata``.

    Args:
        words: what the message says was expected.
        read: puts a value into form, or refuses it with ``TypeError`` or ``ValueError``.
        stages: the ZeRO stages that look at the key.
    """
    return {"words": words, "read": read, "stages": stages}


def whole(default: int | None, least: int = 0, stages: tuple[int, ...] = STAGES) -> Any:
    """A whole number, also when written as ``2e8``."""

    def read(value: Any) -> int:
        if isinstance(value, (bool, str)) or value != int(value) or value < least:
            raise ValueError(value)
        return int(value)

    return field(default=default, metadata=check(f"a whole number of at least {least}", read, stages))


def switch(default: bool | None, stages: tuple[int, ...] = STAGES) -> Any:
    """True or false."""

    def read(value: Any) -> bool:
        if value not in (True, False):
            raise ValueError(value)
        return bool(value)

    return field(default=default, metadata=check("True or False", read, stages))
