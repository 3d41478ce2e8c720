"""``rank_zero_first``: order, errors, and nobody left waiting."""

import time

import pytest

from fabric_core import Fabric


def launched():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    return fabric


def order(local):
    fabric = launched()
    with fabric.rank_zero_first(local=local):
        if fabric.global_rank == 0:
            time.sleep(0.2)
        entered = time.time()
    fabric.barrier()
    return entered


@pytest.mark.parametrize("local", [False, True])
def test_rank_zero_is_done_before_the_others_begin(local, workers):
    first, second = workers(2).run(order, local)
    assert first < second


def build_once(folder):
    fabric = launched()
    with fabric.rank_zero_first():
        target = f"{folder}/data"
        try:
            with open(target, "x") as file:
                file.write("made")
            return "made"
        except FileExistsError:
            with open(target) as file:
                return file.read() + " before"


def test_what_rank_zero_made_is_there_for_the_others(workers, tmp_path):
    assert workers(2).run(build_once, str(tmp_path)) == ["made", "made before"]


def repeated():
    fabric = launched()
    log = []
    for index in range(3):
        with fabric.rank_zero_first():
            log.append(index)
    return log


def test_it_can_be_used_again(workers):
    assert workers(2).run(repeated) == [[0, 1, 2]] * 2


def failing_on(rank):
    fabric = launched()
    try:
        with fabric.rank_zero_first():
            if fabric.global_rank == rank:
                raise LookupError("the body failed here")
    except (LookupError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        failure = None
    return failure, fabric.all_reduce(1.0, reduce_op="sum").item()


def test_a_failure_on_rank_zero_is_told_to_the_others(workers):
    (mine, one), (theirs, two) = workers(2).run(failing_on, 0)
    assert mine == "LookupError: the body failed here"
    assert theirs.startswith("UsageError: fabric.rank_zero_first(): the body failed on a rank that went first")
    assert (one, two) == (2.0, 2.0)


def test_a_failure_elsewhere_is_its_own(workers):
    (mine, one), (theirs, two) = workers(2).run(failing_on, 1)
    assert mine is None
    assert theirs == "LookupError: the body failed here"
    assert (one, two) == (2.0, 2.0)
