"""A failure that one rank sees is caught by the same ``except`` on every rank."""

import errno

import torch

from distributed.sharded_network import launched, set_up
from distributed.small_model import needs_fsdp
from fabric_core.checkpoint.agreement import together
from fabric_core.checkpoint.sharded.ranks import ranks_of
from fabric_core.errors import CheckpointError, CheckpointKeyError, UnsafeCheckpointError, WorkerFailedError

pytestmark = needs_fsdp


def caught(call, *args):
    try:
        call(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def loads(folder):
    fabric = launched()
    model, _ = set_up(fabric)
    (folder / "empty").mkdir(exist_ok=True)
    errors = {"in step": fabric.broadcast("in step")}
    for name in ("none", "empty", "unsafe"):
        errors[f"load {name}"] = caught(fabric.load, folder / name, {"model": model})
        errors[f"load_raw {name}"] = caught(fabric.load_raw, folder / name, model)
    fabric.barrier()
    return {key: (type(error).__name__, str(error)) for key, error in errors.items()}


def test_what_is_wrong_with_a_checkpoint_is_the_same_error_on_all_ranks(tmp_path, workers):
    torch.save({"model": CheckpointError("an object")}, tmp_path / "unsafe")
    first, second = workers(2).run(loads, tmp_path)
    for key, (kind, text) in first.items():
        assert second[key][0] == kind, key
        assert key == "in step" or second[key][1] == text or "rank 0" in second[key][1], key
    for call in ("load", "load_raw"):
        assert first[f"{call} none"][0] == "FileNotFoundError"
        assert first[f"{call} unsafe"][0] == "UnsafeCheckpointError"


class OnThisRankOnly(FileNotFoundError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Unsendable(str):
    def __reduce__(self):
        raise TypeError("no")


FAILURES = [
    FileNotFoundError("nothing there"),
    IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
    OSError(errno.EXDEV, "Across", "x", None, "y"),
    FileNotFoundError(errno.ENOENT, "Gone", Unsendable("x")),
    OnThisRankOnly("a", "b"),
    UnsafeCheckpointError("it runs code"),
    CheckpointKeyError("no 'a'"),
    WorkerFailedError("gone", 3),
    LookupError("no state"),
]


def failing():
    launched()
    ranks = ranks_of()
    told = []
    for number, failure in enumerate(FAILURES):

        def action(failure=failure, number=number):
            if ranks.rank == number % 2:
                raise failure

        error = caught(together, ranks, action, "It was not done")
        own = ranks.rank == number % 2
        assert (error is failure) == own
        if not own:
            told.append((number, type(error), str(error), getattr(error, "errno", None)))
    return told


def test_the_other_ranks_are_told_with_a_class_that_they_have(workers):
    found = {number: told for answer in workers(2).run(failing) for number, *told in answer}

    def text(number, name):
        return f"It was not done, because rank {number % 2} cannot: {name}: "

    assert found == {
        0: [FileNotFoundError, text(0, "FileNotFoundError") + "nothing there", None],
        1: [IsADirectoryError, f"[Errno {errno.EISDIR}] Is a directory (on rank 1): 'x'", errno.EISDIR],
        2: [OSError, f"[Errno {errno.EXDEV}] Across (on rank 0): 'x' -> 'y'", errno.EXDEV],
        3: [CheckpointError, text(3, "FileNotFoundError") + f"[Errno {errno.ENOENT}] Gone: 'x'", None],
        4: [FileNotFoundError, text(4, "OnThisRankOnly") + "a and b", None],
        5: [UnsafeCheckpointError, text(5, "UnsafeCheckpointError") + "it runs code", None],
        6: [CheckpointKeyError, text(6, "CheckpointKeyError") + "no 'a'", None],
        7: [WorkerFailedError, text(7, "WorkerFailedError") + "gone", None],
        8: [CheckpointError, text(8, "LookupError") + "no state", None],
    }
