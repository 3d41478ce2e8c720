import itertools
import json
import logging
import os
import random

import numpy
import pytest
import torch

from fabric_core.errors import InvalidTypeError
from fabric_core.rank_zero import rank_zero_only
from fabric_core.seeding import (
    collect_rng_states,
    reset_seed,
    seed_everything,
    set_rng_states,
    temporary_seed,
    worker_init_function,
)


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_the_same_seed_gives_the_same_numbers():
    assert seed_everything(5) == 5
    first = draw()
    seed_everything(6)
    assert draw() != first
    seed_everything(5)
    assert draw() == first


def test_the_seed_is_left_for_other_processes(monkeypatch):
    seed_everything(5, workers=True)
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == ("5", "1")
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert seed_everything() == 7


def test_no_seed_at_all_is_zero_and_reported(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with pytest.warns(UserWarning, match="seed 0") as record:
        assert seed_everything() == 0
    assert record[0].filename == __file__


@pytest.mark.parametrize("seed", [-1, 2**32, "x"])
def test_a_seed_out_of_range_or_in_words_is_an_error(seed, monkeypatch):
    with pytest.raises(ValueError, match="4294967295"):
        seed_everything(seed)
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED"):
        seed_everything()


def test_a_seed_of_another_type_is_an_error():
    with pytest.raises(InvalidTypeError, match=r"seed=1\.5"):
        seed_everything(1.5)
    assert seed_everything(numpy.int64(3)) == 3
    assert seed_everything(2**32 - 1) == 2**32 - 1


def test_the_seed_is_logged_with_the_rank(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    caplog.set_level(logging.INFO)
    seed_everything(1, verbose=False)
    seed_everything(2)
    assert caplog.messages == ["[rank: 3] Seed set to 2"]
    assert caplog.records[0].filename == os.path.basename(__file__)


def test_resetting_repeats_the_numbers_and_the_setting_for_workers(monkeypatch):
    seed_everything(5, workers=True)
    first = draw()
    reset_seed()
    assert draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "1"
    monkeypatch.delenv("PL_GLOBAL_SEED")
    state = torch.get_rng_state()
    reset_seed()
    assert torch.equal(torch.get_rng_state(), state)


def worker_seed(base, worker, rank):
    torch.manual_seed(base + worker)  # as torch does before it calls the function
    worker_init_function(worker, rank)
    return torch.initial_seed(), *draw()


def test_workers_seeds_differ_by_worker_rank_and_base_and_repeat():
    keys = [(base, worker, rank) for base in (0, 1) for worker in range(8) for rank in range(8)]
    drawn = [worker_seed(*key) for key in keys]
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == len(keys)
    assert worker_seed(*keys[3]) == drawn[3]


def test_neighbouring_workers_differ_in_half_of_the_bits():
    seeds = [worker_seed(0, worker, 0)[0] % 2**64 for worker in range(100)]
    flips = [(one ^ two).bit_count() for one, two in itertools.pairwise(seeds)]
    assert 28 < sum(flips) / len(flips) < 36


def test_the_rank_of_a_worker_is_found_if_not_given():
    rank_zero_only.rank = 3
    assert worker_seed(0, 0, None) == worker_seed(0, 0, 3)


def test_states_put_back_repeat_the_numbers_also_after_json_and_weights_only(tmp_path):
    states = collect_rng_states()
    first = draw()
    set_rng_states(states)
    assert draw() == first
    set_rng_states(
        json.loads(json.dumps({key: states[key] for key in ("python", "numpy")})) | {"torch": states["torch"]}
    )
    assert draw() == first
    torch.save(states, tmp_path / "s.pt")
    set_rng_states(torch.load(tmp_path / "s.pt", weights_only=True))
    assert draw() == first


def test_states_of_devices_that_are_not_here_are_left_alone():
    set_rng_states({"torch.imaginary": [torch.zeros(1)]})
    assert all(not key.startswith("torch.") for key in collect_rng_states(include_device=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_of_devices_in_use_are_put_back():
    torch.rand(1, device="cuda")
    states = collect_rng_states()
    assert len(states["torch.cuda"]) == torch.cuda.device_count()
    first = torch.rand(3, device="cuda")
    set_rng_states(states)
    assert torch.equal(torch.rand(3, device="cuda"), first)


def test_a_temporary_seed_leaves_no_trace_even_if_the_body_raises():
    seed_everything(5)
    first = draw()
    seed_everything(5)
    with temporary_seed(1):
        inside = draw()
    with pytest.raises(KeyError), temporary_seed(1):
        raise KeyError(draw())
    assert draw() == first
    with temporary_seed(1):
        assert draw() == inside
