"""Several processes write one checkpoint, and read it however they are placed."""

import itertools
import os
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fabric_core.checkpoint.sharded import is_sharded, open_sharded, ranks_of, verify, write_sharded
from fabric_core.errors import CheckpointError, UnsupportedError

SHAPES = [(8, 6), (5, 3), (1, 7), (3,), (2, 3, 5), (0, 4)]


def whole(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1


def placements(mesh, dims):
    """All ways to place a tensor of that many dims: each axis of the mesh cuts one of them, or none."""
    kinds = [Replicate(), *(Shard(dim) for dim in range(dims))]
    return list(itertools.product(kinds, repeat=mesh.ndim))


def meshes():
    size = dist.get_world_size()
    flat = init_device_mesh("cpu", (size,))
    return [flat] if size == 2 else [flat, init_device_mesh("cpu", (2, size // 2))]


def empty_like(tensor):
    return DTensor.from_local(
        torch.full_like(tensor.to_local(), -1),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def placed():
    """Name to tensor and to what it is as a whole, for every shape and placement."""
    tensors = {}
    for mesh, shape in itertools.product(meshes(), SHAPES):
        for kinds in placements(mesh, len(shape)):
            name = f"{tuple(mesh.shape)} {shape} {kinds}".replace(".", "")
            tensors[name] = distribute_tensor(whole(shape), mesh, kinds), whole(shape)
    return tensors


def check_every_placement(folder):
    """Written in each placement, read in each other one, whole, and by this process alone."""
    tensors = placed()
    state = {"model": {name: tensor for name, (tensor, _) in tensors.items()}, "plain": torch.ones(2), "n": 3}
    write_sharded(f"{folder}/ck", state, {"epoch": 1}, ranks_of())
    with open_sharded(f"{folder}/ck") as checkpoint:
        everything = {f"model.{name}": torch.empty_like(content) for name, (_, content) in tensors.items()}
        checkpoint.read(everything)
        for name, (_, content) in tensors.items():
            assert torch.equal(everything[f"model.{name}"], content), name
        names = list(tensors)
        for position, name in enumerate(names):
            # Placements of one shape follow each other, so the ones after it are others, of the same shape or not.
            for other in names[position : position + 4]:
                target = tensors[other][0]
                if target.shape == tensors[name][0].shape:
                    wanted = empty_like(target)
                    checkpoint.read({f"model.{name}": wanted})
                    assert torch.equal(wanted.to_local(), target.to_local()), (name, other)
        assert checkpoint.read_object("n") == 3
    if dist.get_rank() == 0:
        assert verify(f"{folder}/ck") == []


def check_cuts_in_another_order(folder):
    """FSDP cuts what tensor parallelism has cut before; evenly and unevenly, as it happens."""
    mesh = init_device_mesh("cpu", (2, 2))
    coordinate = mesh.get_coordinate()
    state, parts = {}, {}
    for rows in range(1, 11):
        content = whole((rows, 3))
        outer = list(content.chunk(2)) + [content[:0]] * 2
        inner = list(outer[coordinate[1]].chunk(2)) + [content[:0]] * 2
        parts[str(rows)] = inner[coordinate[0]]
        state[str(rows)] = DTensor.from_local(
            parts[str(rows)].clone(),
            mesh,
            [_StridedShard(0, split_factor=2), Shard(0)],
            run_check=False,
            shape=content.shape,
            stride=content.stride(),
        )
    write_sharded(f"{folder}/ck", state, {}, ranks_of())
    with open_sharded(f"{folder}/ck") as checkpoint:
        for key, tensor in state.items():
            content, mine = torch.empty(int(key), 3), empty_like(tensor)
            checkpoint.read({key: content})
            assert torch.equal(content, whole((int(key), 3))), key
            checkpoint.read({key: mine})
            assert torch.equal(mine.to_local(), parts[key]), key
    in_pieces = DTensor.from_local(
        torch.ones(2, 3), mesh, [_StridedShard(0, split_factor=4), Shard(0)], run_check=False
    )
    with pytest.raises(UnsupportedError, match="not in one piece"):
        write_sharded(f"{folder}/no", {"w": in_pieces}, {}, ranks_of())
    assert not os.path.exists(f"{folder}/no")


def load_with_dcp(folder):
    import torch.distributed.checkpoint as dcp

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"model": {"w": distribute_tensor(whole((5, 3)), mesh, [Shard(0)])}, "n": 3}
    write_sharded(f"{folder}/ours", state, {}, ranks_of())
    target = {"model": {"w": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)])}, "n": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=f"{folder}/ours")
        dcp.save(state, checkpoint_id=f"{folder}/theirs")
    assert torch.equal(target["model"]["w"].full_tensor(), whole((5, 3)))
    assert target["n"] == 3
    dist.barrier()
    with open_sharded(f"{folder}/theirs") as checkpoint:
        w = empty_like(target["model"]["w"])
        checkpoint.read({"model.w": w})
        assert torch.equal(w.to_local(), target["model"]["w"].to_local())


def fail_everywhere(folder):
    """On each rank in turn, at each stage; all ranks raise, and the old checkpoint is as it was."""
    ranks, path = ranks_of(), f"{folder}/ck"
    write_sharded(path, {"n": 1}, {}, ranks)
    said = []
    for rank in range(ranks.size):
        # Of no function there is a state; two values for one key cannot be planned; a lock cannot be copied.
        for bad in ({"bad": lambda: None}, {"a.b": 1, "a": {"b": 1}}, {"bad": threading.Lock()}):
            with pytest.raises((CheckpointError, ValueError)) as error:
                write_sharded(path, {f"n{ranks.rank}": 2} | (bad if rank == ranks.rank else {}), {}, ranks)
            said.append(str(error.value))
            assert os.listdir(folder) == ["ck"]
            dist.barrier()
    with open_sharded(path) as checkpoint:
        assert checkpoint.objects == {"n"}
    return said


def refuse_together(folder):
    with pytest.raises(IsADirectoryError, match="holds other things"):
        write_sharded(folder, {"n": 1}, {}, ranks_of())


def save_from_other_folders(folder):
    here = os.path.join(folder, str(dist.get_rank()))
    os.makedirs(here)
    os.chdir(here)
    write_sharded("ck", {f"n{dist.get_rank()}": 1}, {"rank": dist.get_rank()}, ranks_of())
    return is_sharded("ck")


def save_in_background(folder):
    """A save in a thread with a group of its own, while the default group is in use."""
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = distribute_tensor(whole((64, 3)), mesh, [Shard(0)])
    for round in range(5):
        failed = []

        def save(round=round, failed=failed):
            try:
                write_sharded(f"{folder}/ck", {"w": w, "round": round}, {}, ranks_of(group))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=save)
        thread.start()
        total = torch.ones(1)
        for _ in range(200):
            dist.all_reduce(total.fill_(1))
        assert total == dist.get_world_size()
        thread.join()
        assert not failed
        with open_sharded(f"{folder}/ck") as checkpoint:
            assert checkpoint.read_object("round") == round
        dist.barrier()


def save_in_a_part(folder):
    """Half of the processes save, in a group whose first rank is not the job's."""
    group = dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        ranks = ranks_of(group)
        assert ranks.size == 2
        assert ranks.gather(dist.get_rank()) == [1, 3]
        assert ranks.broadcast(dist.get_rank()) == 1
        write_sharded(f"{folder}/ck", {f"n{dist.get_rank()}": 1}, {"first": ranks.rank}, ranks)
    dist.barrier()
    with open_sharded(f"{folder}/ck") as checkpoint:
        return sorted(checkpoint.objects), checkpoint.extras


@pytest.mark.parametrize("size", [2, 4])
def test_every_placement_is_written_and_read_in_every_other(size, workers, tmp_path):
    workers(size).run(check_every_placement, str(tmp_path), timeout=150)
    with open_sharded(tmp_path / "ck") as checkpoint:  # by a process that took no part
        content = {key: torch.empty(info.shape) for key, info in checkpoint.tensors.items() if "(5, 3)" in key}
        checkpoint.read(content)
    assert content
    assert all(torch.equal(tensor, whole((5, 3))) for tensor in content.values())


def test_a_dim_that_two_axes_cut_in_reverse_order_comes_back(workers, tmp_path):
    workers(4).run(check_cuts_in_another_order, str(tmp_path))


def test_dcp_reads_ours_and_we_read_dcps(workers, tmp_path):
    workers(2).run(load_with_dcp, str(tmp_path))


def test_a_failure_of_one_rank_is_one_of_all_and_the_old_one_stays(workers, tmp_path):
    first, second = workers(2).run(fail_everywhere, str(tmp_path))
    assert all("rank 0 failed" in text for text in second[:3])
    assert all("rank 1 failed" in text for text in first[3:])


def test_a_folder_with_other_things_is_refused_by_all(workers, tmp_path):
    (tmp_path / "thesis.tex").touch()
    workers(2).run(refuse_together, str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_relative_path_is_where_rank_0_runs(workers, tmp_path):
    assert workers(2).run(save_from_other_folders, str(tmp_path)) == [True, False]
    with open_sharded(tmp_path / "0" / "ck") as checkpoint:
        assert checkpoint.objects == {"n0", "n1"}
        assert checkpoint.extras == {"rank": 0}


def test_a_save_in_the_background_disturbs_nobody(workers, tmp_path):
    workers(2).run(save_in_background, str(tmp_path))


def test_a_part_of_the_processes_can_save(workers, tmp_path):
    assert workers(4).run(save_in_a_part, str(tmp_path)) == [(["n1", "n3"], {"first": 0})] * 4
