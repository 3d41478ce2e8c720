"""Forward that runs again in backward: the same gradients from fewer kept results."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from core.strategies.sharded.blocks import needs_fsdp
from fabric_core import Fabric
from fabric_core.strategies import FSDPStrategy, SelectiveCheckpoint
from fabric_core.strategies.sharded.activation_checkpointing import checkpoint_modules, read_checkpointing
from fabric_core.warnings import FabricDeprecationWarning


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(6, 12), nn.Linear(12, 6), nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        return x + scale * self.second(self.dropout(torch.relu(self.first(x))))


def model(blocks=3):
    torch.manual_seed(1)
    return nn.Sequential(*(Block() for _ in range(blocks)))


class Runs(TorchDispatchMode):
    """Counts the runs of one operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.count = operation, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operation
        return func(*args, **(kwargs or {}))


def train(module):
    """Gradients, and how many linear layers run in backward."""
    torch.manual_seed(3)
    loss = module(torch.ones(4, 6)).sum()
    with Runs(torch.ops.aten.addmm.default) as runs:
        loss.backward()
    return [p.grad for p in module.parameters()], runs.count


def elements_kept(module):
    """How many elements forward keeps for backward."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.ones(4, 6))
    return sum(kept)


POLICIES = [
    {Block},
    [Block],
    ModuleWrapPolicy({Block}),
    CustomPolicy(lambda module: isinstance(module, Block)),
    lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_equal_and_less_is_kept(policy):
    (plain, again), kept = train(model()), elements_kept(model())
    module = model()
    names = list(module.state_dict())
    assert checkpoint_modules(module, policy) == list(module)
    (checkpointed, more), fewer = train(module), elements_kept(module)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert fewer < kept / 4
    assert (again, more) == (0, 3)  # a block's last operation is not needed again
    assert list(module.state_dict()) == names


@pytest.mark.parametrize(
    "save",
    [
        [torch.ops.aten.addmm.default],
        [torch.ops.aten.addmm],
        lambda ctx, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE
        ),
    ],
)
def test_chosen_operations_do_not_run_again(save):
    plain, _ = train(model())
    module = model()
    checkpoint_modules(module, SelectiveCheckpoint({Block}, save))
    checkpointed, again = train(module)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert again == 0


def test_what_is_no_operation_cannot_be_saved():
    with pytest.raises(TypeError, match=r"lists 'mm'.*such as torch.ops.aten.mm"):
        read_checkpointing(None, SelectiveCheckpoint({Block}, ["mm"]))


def test_without_gradients_forward_is_as_it_was():
    module = model()
    checkpoint_modules(module, {Block})
    with torch.no_grad():
        assert not module(torch.ones(1, 6)).requires_grad


def test_arguments_by_keyword_and_the_signature_pass():
    module = nn.Sequential(Block())
    checkpoint_modules(module, {Block})
    block = module.eval()[0]
    x = torch.ones(1, 6)
    assert torch.equal(block(x, scale=0.0), x)
    assert functools.partial(block.forward, scale=0.0)(x).equal(x)


def test_hooks_of_the_module_run_once():
    module, calls = model(1), []
    checkpoint_modules(module, {Block})
    module[0].register_forward_hook(lambda *_: calls.append(1))
    train(module)
    assert calls == [1]


def test_a_copy_runs_its_own_parameters():
    module = nn.Sequential(Block().eval())
    checkpoint_modules(module, {Block})
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(copied(torch.ones(1, 6)), torch.ones(1, 6))


def test_a_forward_that_was_replaced_on_the_object_is_kept():
    module = nn.Sequential(Block())
    module[0].forward = lambda x, shift: x + shift
    checkpoint_modules(module, {Block})
    assert module[0](torch.ones(1), shift=2).item() == 3


def test_nothing_is_checkpointed_twice():
    module = model(2)
    checkpoint_modules(module, {Block})
    with pytest.warns(UserWarning, match="2 modules of Block are checkpointed already"):
        assert checkpoint_modules(module, {Block}) == []
    assert train(module)[1] == 2


def test_torchs_own_wrapper_is_left_alone():
    module = model(2)
    module[0] = checkpoint_wrapper(module[0])
    with pytest.warns(UserWarning, match="1 modules of Block are checkpointed already"):
        assert checkpoint_modules(module, {Block}) == [module[1]]
    assert train(module)[1] == 2


def test_a_policy_that_matches_nothing_is_told():
    with pytest.warns(UserWarning, match=r"activation_checkpointing_policy=.*Conv2d.* matches no module of Sequential"):
        assert checkpoint_modules(model(), {nn.Conv2d}) == []


def test_the_old_argument_is_deprecated():
    with pytest.warns(FabricDeprecationWarning, match="pass activation_checkpointing_policy={Block} instead") as caught:
        assert FSDPStrategy(activation_checkpointing=Block).activation_checkpointing_policy == {Block}
    assert caught[0].filename == __file__
    with pytest.warns(FabricDeprecationWarning):
        assert FSDPStrategy(activation_checkpointing=[Block, Runs]).activation_checkpointing_policy == {Block, Runs}


def test_the_old_and_the_new_argument_exclude_each_other():
    with pytest.raises(ValueError, match="are both given"):
        FSDPStrategy(activation_checkpointing=Block, activation_checkpointing_policy={Block})


def test_operations_of_a_module_that_holds_units_cannot_be_chosen_from():
    module = nn.Sequential(nn.Sequential(Block()))
    with pytest.raises(ValueError, match="picks a Sequential, which holds a Block that is sharded by itself"):
        checkpoint_modules(module, SelectiveCheckpoint({nn.Sequential}, []), [module[0][0]])


class Nested(nn.Module):
    """A checkpointed module that holds units."""

    def __init__(self):
        super().__init__()
        self.inner = model(2)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def train_sharded(checkpointed, nested):
    """Gradients of two steps; the second finds out whether the first left things in order."""
    classes = {Nested} if nested else {Block}
    selective = SelectiveCheckpoint(classes, [torch.ops.aten.addmm.default])
    policy = {"none": None, "all": classes, "selective": selective}[checkpointed]
    strategy = FSDPStrategy(activation_checkpointing_policy=policy, auto_wrap_policy={Block})
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    module = fabric.setup(nn.Sequential(Nested(), *model(1)) if nested else model())
    results = []
    for step in range(2):
        module.zero_grad()
        torch.manual_seed(fabric.global_rank + step)
        fabric.backward(module(torch.ones(4, 6)).sum())
        results += [p.grad.full_tensor().numpy() for p in module.parameters()]
    return results


@needs_fsdp
@pytest.mark.parametrize("nested", [False, True])
def test_sharded_gradients_are_equal(nested, workers):
    plain = workers(2).run(train_sharded, "none", nested)[0]
    for checkpointed in ("all",) if nested else ("all", "selective"):
        gradients = workers(2).run(train_sharded, checkpointed, nested)[0]
        assert all((a == b).all() for a, b in zip(plain, gradients, strict=True))
