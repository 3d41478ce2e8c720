"""Wrong calls, each with a message that says what was passed, what was expected and what to type."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_core import Fabric
from fabric_core.abc import Precision
from fabric_core.plugins import LightningEnvironment, MixedPrecision, TorchCheckpointIO
from fabric_core.strategies import DDPStrategy, SingleDeviceStrategy


def model():
    return nn.Linear(2, 1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


CONSTRUCTION = {
    "unknown accelerator": (dict(accelerator="cpuu"), ValueError, 'Did you mean "cpu"'),
    "accelerator of a wrong type": (dict(accelerator=3), TypeError, "expected a name such as 'auto'"),
    "accelerator not installed": (dict(accelerator="cuda"), ValueError, "pip install fabric-cuda"),
    "gpu without one": (dict(accelerator="gpu"), RuntimeError, "Available here: 'cpu'"),
    "mps not on this machine": (dict(accelerator="mps"), RuntimeError, "'mps' is not available"),
    "generic without a device": (dict(accelerator="generic"), RuntimeError, "reports no device"),
    "unknown strategy": (dict(strategy="ddpp"), ValueError, 'Did you mean "ddp'),
    "strategy of a wrong type": (dict(strategy=7), TypeError, "expected a name such as"),
    "strategy class that is none": (dict(strategy=dict), TypeError, "or a Strategy"),
    "strategy xla": (dict(strategy="xla"), ValueError, "pip install fabric-xla"),
    "no device": (dict(devices=0), ValueError, "accelerator='cpu' without a device"),
    "no device as text": (dict(devices="0"), ValueError, "Ask for at least one"),
    "empty list of devices": (dict(devices=[]), ValueError, "Ask for at least one"),
    "no devices at all": (dict(devices=None), TypeError, "expected a count"),
    "negative devices": (dict(accelerator="cpu", devices=-3), TypeError, "at least 1"),
    "a fraction of devices": (dict(accelerator="cpu", devices=1.5), TypeError, "devices=1.5"),
    "a bool for devices": (dict(accelerator="cpu", devices=True), TypeError, "devices=True"),
    "a word for devices": (dict(accelerator="cpu", devices="two"), TypeError, "devices='two'"),
    "a list for cpu": (dict(accelerator="cpu", devices=[0, 1]), TypeError, "at least 1"),
    "no nodes": (dict(num_nodes=0), ValueError, "num_nodes=0"),
    "nodes as a fraction": (dict(num_nodes=1.5), ValueError, "at least 1"),
    "nodes as a bool": (dict(num_nodes=True), ValueError, "num_nodes=True"),
    "unknown precision": (dict(precision="bf16-mixd"), ValueError, 'Did you mean "bf16-mixed"'),
    "precision of a wrong type": (dict(precision=1.5), TypeError, "expected one of"),
    "precision as a bool": (dict(precision=True), TypeError, "expected one of"),
    "precision of another package, fp8": (dict(precision="transformer-engine"), ValueError, "fabric-cuda"),
    "an odd number of bits": (dict(precision=8), ValueError, "'8'"),
    "plugin of no kind": (dict(plugins=[object()]), TypeError, "expected instances of Precision"),
    "plugin as a class": (dict(plugins=[Precision]), TypeError, "not the class"),
    "two precisions": (dict(plugins=[Precision(), Precision()]), ValueError, "two of the kind Precision"),
    "two environments": (
        dict(plugins=[LightningEnvironment(), LightningEnvironment()]),
        ValueError,
        "two of the kind ClusterEnvironment",
    ),
    "precision as argument and plugin": (
        dict(precision="64-true", plugins=[Precision()]),
        ValueError,
        r"precision='64-true' and plugins=\[Precision",
    ),
    "precision in strategy and argument": (
        dict(strategy=SingleDeviceStrategy(precision=Precision()), precision="64-true"),
        ValueError,
        "precision is given twice",
    ),
    "io in strategy and plugins": (
        dict(strategy=SingleDeviceStrategy(checkpoint_io=TorchCheckpointIO()), plugins=TorchCheckpointIO()),
        ValueError,
        "checkpoint_io is given twice",
    ),
    "environment in strategy and plugins": (
        dict(strategy=DDPStrategy(cluster_environment=LightningEnvironment()), plugins=LightningEnvironment()),
        ValueError,
        "environment is given twice",
    ),
    "strategy's devices are of another kind": (
        dict(accelerator="cpu", strategy=DDPStrategy(parallel_devices=[torch.device("meta")])),
        ValueError,
        "names meta devices",
    ),
    "one-device strategy on two": (
        dict(accelerator="cpu", devices=2, strategy="single_device"),
        ValueError,
        'strategy="ddp"',
    ),
    "a logger that nobody registers": (dict(loggers="wandbb"), ValueError, "wandbb"),
}


@pytest.mark.parametrize(("arguments", "error", "words"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        Fabric(**arguments)


def test_plugin_constructors_refuse():
    with pytest.raises(ValueError, match="expected one of"):
        MixedPrecision("16")
    with pytest.raises(ValueError, match="takes no scaler"):
        MixedPrecision("bf16-mixed", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match='expected "popen"'):
        DDPStrategy(start_method="thread")


def _two_optimizers(fabric):
    m = model()
    fabric.setup(m, sgd(m), m)


def _twice(fabric):
    fabric.setup(fabric.setup(model()))


def _optimizer_twice(fabric):
    m = model()
    _, optimizer = fabric.setup(m, sgd(m))
    fabric.setup_optimizers(optimizer)


def _loader_twice(fabric):
    fabric.setup_dataloaders(fabric.setup_dataloaders(DataLoader([1, 2])))


def _clip(**kwargs):
    def call(fabric):
        m = model()
        m, optimizer = fabric.setup(m, sgd(m))
        fabric.clip_gradients(m, optimizer, **kwargs)

    return call


def _clip_nan(fabric):
    m = model()
    m, optimizer = fabric.setup(m, sgd(m))
    fabric.backward(m(torch.full((1, 2), float("nan"))).sum())
    fabric.clip_gradients(m, optimizer, max_norm=1.0)


CALLS = {
    "setup of a class": (lambda f: f.setup(nn.Linear), TypeError, "the class Linear"),
    "setup of a list": (lambda f: f.setup([model()]), TypeError, "a torch.nn.Module first, not a list"),
    "setup with a module for optimizer": (_two_optimizers, TypeError, "takes torch optimizers"),
    "setup twice": (_twice, ValueError, "already"),
    "setup with a scheduler alone": (lambda f: f.setup(model(), scheduler=object()), ValueError, "no optimizer"),
    "setup_module of None": (lambda f: f.setup_module(None), TypeError, "not a NoneType"),
    "setup_optimizers of nothing": (lambda f: f.setup_optimizers(), ValueError, "at least one optimizer"),
    "setup_optimizers twice": (_optimizer_twice, ValueError, "already"),
    "setup_dataloaders of nothing": (lambda f: f.setup_dataloaders(), ValueError, "at least one data loader"),
    "setup_dataloaders of a list": (lambda f: f.setup_dataloaders([1]), TypeError, "Wrap a data set first"),
    "setup_dataloaders twice": (_loader_twice, ValueError, "already"),
    "backward of a number": (lambda f: f.backward(0.5), TypeError, "the loss tensor, not a float"),
    "clip with neither": (_clip(), ValueError, "got neither"),
    "clip with both": (_clip(clip_val=1.0, max_norm=1.0), ValueError, "got both"),
    "clip of a NaN norm": (_clip_nan, RuntimeError, "error_if_nonfinite=False"),
    "no_backward_sync of a bare module": (lambda f: f.no_backward_sync(model()), TypeError, "fabric.setup"),
    "launch of a result": (lambda f: f.launch(3), TypeError, "not the result of calling it"),
    "launch of what a function returned": (lambda f: f.launch(None), TypeError, "not the result of calling it"),
    "launch of a function without parameters": (lambda f: f.launch(lambda: 1), TypeError, "takes no argument"),
    "broadcast from a word": (lambda f: f.broadcast(1, src="zero"), TypeError, "expected a global rank"),
    "save of a module": (lambda f: f.save("x.ckpt", model()), TypeError, "a dict of names and objects"),
    "save with a filter that is no dict": (lambda f: f.save("x.ckpt", {}, filter=[1]), TypeError, "filter"),
    "save with a filter for an unknown name": (
        lambda f: f.save("x.ckpt", {"a": 1}, filter={"b": lambda k, v: True}),
        ValueError,
        "'b'",
    ),
    "save with a filter that cannot be called": (
        lambda f: f.save("x.ckpt", {"a": 1}, filter={"a": 1}),
        TypeError,
        "filter",
    ),
    "save of a data loader": (lambda f: f.save("x.ckpt", {"d": DataLoader([1])}), Exception, "'d'"),
    "load of nothing": (lambda f: f.load("missing.ckpt"), FileNotFoundError, "missing.ckpt"),
    "load_raw of nothing": (lambda f: f.load_raw("missing.ckpt", model()), FileNotFoundError, "missing.ckpt"),
    "load_raw into a dict": (lambda f: f.load_raw("x.ckpt", {}), TypeError, "a module or an optimizer"),
    "log of a matrix": (lambda f: f.log("x", torch.ones(2, 2)), ValueError, "x"),
    "logger without any": (lambda f: f.logger, IndexError, "no logger"),
    "seed out of range": (lambda f: f.seed_everything(-1), ValueError, "-1"),
    "mark forward": (lambda f: f.setup(model()).mark_forward_method("forward"), ValueError, "needs no mark"),
    "mark a number": (lambda f: f.setup(model()).mark_forward_method(1), TypeError, "or its name"),
    "mark what is not there": (
        lambda f: f.setup(model()).mark_forward_method("run"),
        AttributeError,
        "no method 'run'",
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), CALLS.values(), ids=CALLS)
def test_a_call_refuses(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        call(Fabric(accelerator="cpu", devices=1))
    assert list(tmp_path.iterdir()) == []


NEED_LAUNCH = {
    "setup": lambda f: f.setup(model()),
    "setup_module": lambda f: f.setup_module(model()),
    "setup_optimizers": lambda f: f.setup_optimizers(sgd(model())),
    "setup_dataloaders": lambda f: f.setup_dataloaders(DataLoader([1])),
    "barrier": lambda f: f.barrier(),
    "broadcast": lambda f: f.broadcast(1),
    "all_gather": lambda f: f.all_gather(torch.ones(1)),
    "all_reduce": lambda f: f.all_reduce(torch.ones(1)),
    "init_module": lambda f: f.init_module(),
    "save": lambda f: f.save("x.ckpt", {}),
    "load": lambda f: f.load("x.ckpt"),
    "load_raw": lambda f: f.load_raw("x.ckpt", model()),
}


@pytest.mark.parametrize("name", NEED_LAUNCH)
def test_a_call_needs_launch(name):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(RuntimeError, match=rf"fabric\.{name}\(\) needs the other processes.*fabric\.launch\(\) first"):
        NEED_LAUNCH[name](fabric)


def test_spawning_strategies_need_a_function():
    with pytest.raises(TypeError, match=r"fabric\.launch\(main\)"):
        Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch()


@pytest.mark.parametrize(
    ("variable", "text", "arguments"),
    [
        ("LT_DEVICES", "2", {"devices": 3}),
        ("LT_STRATEGY", "ddp", {"strategy": "ddp_spawn"}),
        ("LT_ACCELERATOR", "cpu", {"accelerator": "gpu"}),
        ("LT_PRECISION", "bf16-mixed", {"precision": "64-true"}),
        ("LT_NUM_NODES", "2", {"num_nodes": 3}),
    ],
)
def test_code_and_command_line_disagree(variable, text, arguments, monkeypatch):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv(variable, text)
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"Fabric\({name}={value!r}\) in code.*{variable}"):
        Fabric(**arguments)
