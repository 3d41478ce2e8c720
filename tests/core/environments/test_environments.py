"""What an environment reads, and that reading has no effect."""

import os
import pickle
import socket

import pytest
import torch

from fabric_core import Fabric
from fabric_core.distributed.group import leave_group
from fabric_core.environments.default import LightningEnvironment, find_free_network_port
from fabric_core.environments.hooks import fabric_environment_candidates
from fabric_core.environments.torchelastic import TorchElasticEnvironment
from fabric_core.errors import InvalidArgumentError, UsageError
from fabric_core.warnings import PossibleUserWarning

NAMES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK MASTER_ADDR MASTER_PORT STANDALONE_PORT "
    "TORCHELASTIC_RUN_ID SLURM_NTASKS SLURM_PROCID SLURM_JOB_NAME LSB_JOBID JSM_NAMESPACE_RANK OMPI_COMM_WORLD_SIZE "
    "PMI_SIZE"
)


@pytest.fixture
def variables(monkeypatch):
    """Set exactly these variables of a job."""

    def set_variables(**values):
        for name in NAMES.split():
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    set_variables()
    return set_variables


def test_a_lone_machine_needs_no_variables(variables):
    environment = LightningEnvironment()
    assert not environment.creates_processes_externally
    assert environment.main_address == "127.0.0.1"
    assert (environment.local_rank(), environment.node_rank(), environment.world_size()) == (0, 0, 1)
    assert environment.local_world_size() is None


def test_a_lone_machine_keeps_the_port_it_chose_until_teardown(variables):
    environment = LightningEnvironment()
    port = environment.main_port
    assert environment.main_port == port
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    environment.teardown()
    with socket.socket() as other:
        other.bind(("", port))


def test_a_copy_for_a_worker_has_the_port_and_not_the_reservation(variables):
    environment = LightningEnvironment()
    port = environment.main_port
    assert pickle.loads(pickle.dumps(environment)).main_port == port
    environment.teardown()


def test_a_port_that_was_given_is_used(variables):
    variables(STANDALONE_PORT=1234)
    assert (LightningEnvironment().main_port, find_free_network_port()) == (1234, 1234)
    variables(STANDALONE_PORT=1234, MASTER_PORT=5678)
    assert LightningEnvironment().main_port == 5678


def test_another_node_must_be_told_the_port(variables):
    variables(NODE_RANK=1)
    with pytest.raises(UsageError, match="set MASTER_ADDR and MASTER_PORT to the same values on every node"):
        _ = LightningEnvironment().main_port


def test_processes_started_by_hand_say_so_with_local_rank(variables):
    variables(LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, GROUP_RANK=3)
    environment = LightningEnvironment()
    assert environment.creates_processes_externally
    assert (environment.local_rank(), environment.local_world_size(), environment.node_rank()) == (1, 2, 3)


def test_the_strategy_tells_a_lone_machine_its_ranks(variables):
    environment = LightningEnvironment()
    environment.set_world_size(4)
    environment.set_global_rank(3)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)


def test_torchrun_is_recognised_by_its_run_id(variables):
    assert not TorchElasticEnvironment.detect()
    variables(TORCHELASTIC_RUN_ID="x")
    assert TorchElasticEnvironment.detect()


def test_torchruns_variables_are_read(variables):
    variables(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, GROUP_RANK=1, MASTER_ADDR="a", MASTER_PORT=7)
    e = TorchElasticEnvironment()
    assert (e.global_rank(), e.local_rank(), e.node_rank()) == (3, 1, 1)
    assert (e.world_size(), e.local_world_size(), e.main_address, e.main_port) == (4, 2, "a", 7)
    e.set_world_size(9)
    e.set_global_rank(9)
    assert (e.world_size(), e.global_rank()) == (4, 3)


def test_reading_writes_nothing(variables):
    variables(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    before = dict(os.environ)
    for environment in (LightningEnvironment(), TorchElasticEnvironment()):
        _ = environment.main_address, environment.main_port, environment.world_size(), environment.global_rank()
        environment.teardown() if isinstance(environment, TorchElasticEnvironment) else None
    assert dict(os.environ) == before


def test_a_missing_variable_is_named(variables):
    with pytest.raises(UsageError, match="WORLD_SIZE is not set"):
        TorchElasticEnvironment().world_size()


def test_another_number_of_processes_than_were_started_is_refused(variables):
    variables(WORLD_SIZE=2)
    TorchElasticEnvironment().validate_settings(2, 1)
    with pytest.raises(
        InvalidArgumentError, match="devices=4 and num_nodes=1, which is 4 processes, but 2 were started"
    ):
        TorchElasticEnvironment().validate_settings(4, 1)


def test_torchrun_is_preferred_where_it_is_there(variables):
    variables(TORCHELASTIC_RUN_ID="x")
    offers = fabric_environment_candidates(None)
    assert [(offer.name, offer.available) for offer in offers] == [("torchelastic", True), ("default", True)]
    assert offers[0].priority > offers[1].priority


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "10.0.0.1"}, {"MASTER_PORT": 29400}])
def test_several_nodes_must_be_told_where_rank_0_is(variables, given):
    variables(**given)
    with pytest.raises(ValueError, match="num_nodes=2, but MASTER_ADDR and MASTER_PORT are not both set") as error:
        LightningEnvironment().validate_settings(1, 2)
    assert "NODE_RANK=0 python train.py" in str(error.value)


def test_several_nodes_that_were_told_are_fine(variables):
    variables(MASTER_ADDR="10.0.0.1", MASTER_PORT=29400)
    LightningEnvironment().validate_settings(1, 2)


@pytest.mark.parametrize(("name", "expected"), [("LOCAL_WORLD_SIZE", 2), ("WORLD_SIZE", 4)])
def test_processes_started_by_hand_must_be_as_many_as_asked_for(variables, name, expected):
    where = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 29400}
    variables(**where, LOCAL_RANK=0, **{name: expected})
    LightningEnvironment().validate_settings(2, 2)
    variables(**where, LOCAL_RANK=0, **{name: 3})
    with pytest.raises(InvalidArgumentError, match=f"{name}=3 that there are 3 where {expected} were expected"):
        LightningEnvironment().validate_settings(2, 2)
    variables(**where, **{name: 3})
    LightningEnvironment().validate_settings(2, 2)


def test_one_process_leaves_the_environment_as_it_was(variables):
    variables()
    before = dict(os.environ)
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp")
    fabric.launch()
    assert fabric.all_reduce(torch.ones(1), reduce_op="sum").item() == 1
    fabric.teardown()
    leave_group()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "seen",
    [
        {"SLURM_NTASKS": 2, "SLURM_PROCID": 0},
        {"LSB_JOBID": 7, "JSM_NAMESPACE_RANK": 1},
        {"OMPI_COMM_WORLD_SIZE": 4},
        {"PMI_SIZE": 4},
    ],
)
def test_several_tasks_that_do_not_know_of_each_other_are_refused(variables, seen):
    variables(**seen)
    with pytest.warns(PossibleUserWarning, match="each task would be a job of its own"):
        environment = Fabric(accelerator="cpu", devices=1).plan.environment.value
    environment.validate_settings(1, 1)
    with pytest.raises(UsageError, match=f"{next(iter(seen))}=.*torchrun.*YourClusterEnvironment"):
        environment.validate_settings(2, 1)
    variables(**seen, LOCAL_RANK=0)
    LightningEnvironment().validate_settings(2, 1)


@pytest.mark.parametrize(
    "seen",
    [
        {"SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_JOB_NAME": "bash"},
        {"SLURM_NTASKS": 1, "SLURM_PROCID": 0},
        {"LSB_JOBID": 7},
        {"PMI_SIZE": 1},
    ],
)
def test_a_single_task_of_a_scheduler_is_a_lone_machine(variables, seen):
    variables(**seen)
    LightningEnvironment().validate_settings(2, 1)
