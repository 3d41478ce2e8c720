"""Which modules become units. No process group is needed to choose."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    always_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from fabric_core.strategies.sharded.wrapping import check_policy, choose_units


class Block(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, blocks=3, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def units(model, policy=None, **ignored):
    """Names of the units, inner first."""
    names = {module: name for name, module in model.named_modules()}
    return [names[unit.module] for unit in choose_units(model, policy, **ignored)]


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def test_blocks_that_repeat_are_the_default_units():
    assert units(Model()) == BLOCKS


def test_a_block_that_does_not_repeat_is_none():
    assert units(Model(blocks=1)) == []


def test_blocks_are_looked_for_at_any_depth():
    outer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), nn.ReLU(), Block()), Model())
    assert units(outer) == ["1.0", "1.2", "2.blocks.0", "2.blocks.1", "2.blocks.2"]


def test_stages_are_opened_if_blocks_repeat_inside_and_taken_whole_if_not():
    stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    assert units(stages) == ["0.0", "0.1", "1.0", "1.1"]
    stages = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert units(stages) == ["0", "1"]


def test_lists_of_lists_are_no_units_as_nobody_calls_them():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "b": nn.ModuleList([nn.Linear(2, 2)])})
    assert units(model) == []


def test_modules_without_parameters_do_not_repeat():
    assert units(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())) == []


def test_the_same_module_twice_is_no_repetition():
    block = Block()
    assert units(nn.Sequential(block, block)) == []


def test_a_model_may_name_its_blocks():
    model = Model()
    model._no_split_modules = ["Embedding", "Nothing"]
    assert units(nn.Sequential(model)) == ["0.embedding"]


@pytest.mark.parametrize(
    "policy",
    [
        {Block},
        [Block],
        ModuleWrapPolicy({Block}),
        CustomPolicy(lambda module: isinstance(module, Block)),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}),
        partial(size_based_auto_wrap_policy, min_num_params=28),
        lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, Block),
        lambda m, r, n: r or isinstance(m, Block),
        lambda module, recurse, **rest: recurse or isinstance(module, Block),
    ],
)
def test_every_kind_of_policy_picks_the_blocks(policy):
    expected = (
        ["embedding", *BLOCKS, "head"] if getattr(policy, "func", None) is size_based_auto_wrap_policy else BLOCKS
    )
    assert units(Model(), policy) == expected


def test_a_function_is_told_what_is_left_on_the_way_up():
    told = []

    def policy(module, recurse, nonwrapped_numel):
        told.append((type(module).__name__, recurse, nonwrapped_numel))
        return recurse or isinstance(module, nn.Linear)

    units(nn.Sequential(Block()), policy)
    sequential, block, norm, linear = ("Sequential", 28), ("Block", 28), ("LayerNorm", 8), ("Linear", 20)
    down = [(name, True, size) for name, size in (sequential, block, norm)]
    assert told == [*down, ("LayerNorm", False, 8), (linear[0], True, 20), (linear[0], False, 20), ("Block", False, 8)]


def test_a_function_decides_how_deep_to_look():
    assert units(Model(), lambda module, recurse, nonwrapped_numel: not isinstance(module, Block)) == [
        "embedding",
        "head",
    ]


def test_nested_units_come_before_those_around_them():
    assert units(Model(blocks=1), {Block, nn.Linear}) == ["blocks.0.linear", "blocks.0", "head"]


def test_the_root_and_what_cannot_be_called_are_never_units():
    assert units(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), always_wrap_policy) == ["0.0"]


def test_a_policy_object_may_ask_for_more_of_one_unit():
    model = Model()
    policy = CustomPolicy(
        lambda module: {"forward_prefetch": True} if module is model.head else isinstance(module, Block)
    )
    found = {type(unit.module).__name__: unit.overrides for unit in choose_units(model, policy)}
    assert found == {"Block": {}, "Linear": {"forward_prefetch": True}}


def test_ignored_modules_are_no_units():
    model = Model()
    ignored = set(model.blocks[1].modules())
    assert units(model, ignored=ignored) == ["blocks.0", "blocks.2"]
    assert units(model, {Block}, ignored=ignored) == ["blocks.0", "blocks.2"]
    assert units(model, lambda m, r, n: r or isinstance(m, Block), ignored=ignored) == ["blocks.0", "blocks.2"]


def test_blocks_without_anything_to_shard_are_no_units():
    model = Model()
    places = {(part, name) for part in model.blocks[0].modules() for name in part._parameters}
    assert units(model, places=places) == ["blocks.1", "blocks.2"]


def test_a_policy_that_matches_nothing_says_what_there_is():
    with pytest.warns(UserWarning, match=r"matches no module of Model.*Block \(3\)"):
        assert units(Model(), {nn.Conv2d}) == []


def test_an_empty_set_asks_for_no_units_at_all():
    assert units(Model(), set()) == []


@pytest.mark.parametrize("policy", [Block, "Block", 3])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(TypeError, match=r"auto_wrap_policy=.*expected a set of module classes"):
        check_policy("auto_wrap_policy", policy)


def test_a_set_holds_classes_of_modules():
    with pytest.raises(TypeError, match=r"auto_wrap_policy lists 'Block' .str.: expected classes of modules"):
        check_policy("auto_wrap_policy", {"Block"})


def test_a_function_takes_three_arguments():
    with pytest.raises(TypeError, match=r"cannot be called with \(module, recurse, nonwrapped_numel\)"):
        check_policy("auto_wrap_policy", lambda module: True)


def test_units_that_share_a_parameter_leave_it_to_the_module_around_them():
    with pytest.warns(UserWarning, match=r"embedding \(Embedding: embedding.weight = head.weight\); head"):
        assert units(Model(tied=True), {nn.Embedding, Block, nn.Linear}) == [
            f"blocks.{i}{part}" for i in range(3) for part in (".linear", "")
        ]


def test_parameters_tied_outside_units_are_nobodys_business():
    assert units(Model(tied=True)) == BLOCKS


def test_a_tie_inside_one_unit_stays_there():
    inner, outer = Model(tied=True), Model()
    assert units(nn.Sequential(inner, outer), {Model}) == ["0", "1"]


def test_only_units_below_the_common_one_are_dropped():
    with pytest.warns(UserWarning, match=r"share parameters"):
        assert units(nn.Sequential(Model(blocks=0, tied=True)), {Model, nn.Embedding, nn.Linear}) == ["0"]


def test_a_module_used_in_two_units_is_sharded_around_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(4, 4)
            self.a, self.b = nn.Sequential(shared, nn.LayerNorm(4)), nn.Sequential(shared, nn.LayerNorm(4))

    with pytest.warns(UserWarning, match=r"share parameters"):
        assert units(Two(), {nn.Sequential}) == []
    assert units(Two(), {nn.Linear}) == ["a.0"]


def test_choosing_works_without_memory():
    with torch.device("meta"), pytest.warns(UserWarning, match=r"share parameters"):
        assert units(Model(tied=True), {nn.Linear, nn.Embedding})[-1] == "blocks.2.linear"
