"""Recording a forward pass: nothing that computes goes unseen, and nothing outside of the recording changes."""

from __future__ import annotations

import copy
import math
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from timm_ghn.errors import CaptureError
from timm_ghn.graph import Graph, to_graph
from timm_ghn.trace.capture import capture
from timm_ghn.trace.skeleton import skeleton_of

SIZE = (3, 16, 16)


class Residual(nn.Module):
    """`x + b(middle(x))` between two layers: `b` is a layer of the network only if `middle` passes on its input."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc((x + self.b(self.middle(x))).mean((2, 3)))


class Plain(Tensor):
    """A tensor subclass without kernels of its own."""


class Wrapper(Tensor):
    """A tensor subclass that computes with the tensor that it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = [arg.held if isinstance(arg, Wrapper) else arg for arg in args]
        return Wrapper(func(*held, **(kwargs or {})))


def without_torch_function(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return F.relu(x) * 2


def with_other_data(x: Tensor) -> Tensor:
    other = torch.empty_like(x)
    other.data = x
    return other


def scripted(create: Callable[[], Any]) -> Any:
    with pytest.warns(FutureWarning):
        return create()


def doubled_(x: Tensor) -> Tensor:
    x.mul_(2)
    return x


UNSEEN: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "vmap": lambda: torch.vmap(F.relu),
    "vmap of another dimension": lambda: torch.vmap(F.relu, in_dims=1, out_dims=1),
    "jvp": lambda: lambda x: torch.func.jvp(F.relu, (x,), (x,))[0],
    "grad": lambda: torch.func.grad(lambda x: F.relu(x).sum()),
    "functionalize": lambda: torch.func.functionalize(F.relu),
    "as_subclass": lambda: lambda x: F.relu(x.as_subclass(Plain)),  # type: ignore[arg-type]
    "tv_tensors": lambda: lambda x: F.relu(tv_tensors.Image(x)),
    "copy": lambda: copy.copy,
    "deepcopy": lambda: copy.deepcopy,
    "Parameter": lambda: nn.Parameter,
    "data": lambda: with_other_data,
    "set_": lambda: lambda x: torch.empty(0).set_(x),
    "DisableTorchFunction": lambda: without_torch_function,
    "script": lambda: scripted(lambda: torch.jit.script(F.relu6)),
    "script in place": lambda: (lambda f: lambda x: f(x * 1))(scripted(lambda: torch.jit.script(doubled_))),
    "autograd function": lambda: Doubled.apply,
    "inference mode": lambda: lambda x: F.relu(torch.inference_mode()(lambda: x * 2)()),
    "nested checkpoint": lambda: lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=True),
    "foreach": lambda: lambda x: torch._foreach_mul([x], 2)[0],
    "out": lambda: lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "cond": lambda: lambda x: torch.cond(x.shape[0] == 1, torch.relu, torch.tanh, (x,)),
    "checkpoint": lambda: lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu() * 2


def names(graph: Graph) -> set[str]:
    return {target.name for target in graph.targets}


@pytest.mark.parametrize("name", UNSEEN)
def test_computation_out_of_sight_of_torch_functions_is_followed(name: str) -> None:
    model = Residual(UNSEEN[name]())
    graph = to_graph(model, input_size=SIZE)
    assert names(graph) == {name for name, _ in model.named_parameters() if "middle" not in name}
    assert graph.operators["sum"] == 1


def test_layers_of_scripted_and_traced_modules_are_layers() -> None:
    layers = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()).eval()
    linear = nn.Sequential(nn.Flatten(2), nn.Linear(196, 196), nn.LayerNorm(196), nn.Unflatten(2, (14, 14)))
    for middle in (
        scripted(lambda: torch.jit.script(layers)),
        scripted(lambda: torch.jit.trace(layers, torch.zeros(1, 16, 8, 8))),
        scripted(lambda: torch.jit.script(linear)),
    ):
        model = Residual(middle)
        assert names(to_graph(model, input_size=SIZE)) == {name for name, _ in model.named_parameters()}


def test_scripted_traced_and_exported_models_are_read_as_the_models_are() -> None:
    model, images = timm.create_model("test_resnet").eval(), torch.zeros(1, 3, 64, 64)
    expected = to_graph(model, input_size=images.shape[1:])
    for other in (
        scripted(lambda: torch.jit.script(model)),
        scripted(lambda: torch.jit.trace(model, images)),
        torch.export.export(model, (images,)).module(),
    ):
        assert to_graph(other, input_size=images.shape[1:]) == expected


def test_a_tensor_that_computes_out_of_sight_is_an_error() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(Wrapper(x)).held  # type: ignore[attr-defined]

    with pytest.raises(CaptureError, match=r"module 'middle' in relu: a Wrapper of unknown origin"):
        to_graph(Residual(Inner()), input_size=SIZE)


@pytest.mark.parametrize("memory", [Tensor.untyped_storage, Tensor.storage])
def test_writing_through_memory_is_reported(memory: Callable[[Tensor], Any], caplog: pytest.LogCaptureFixture) -> None:
    def copied(x: Tensor) -> Tensor:
        other = torch.empty_like(x)
        memory(other).copy_(memory(x))
        return other

    to_graph(Residual(copied), input_size=SIZE)
    assert f"the memory of a tensor, given by {memory.__name__}(), is not recorded" in caplog.text


def test_what_other_threads_compute_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def in_a_thread(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(F.relu, x).result()

    to_graph(Residual(in_a_thread), input_size=SIZE)
    assert "conv2d uses a tensor of unknown origin (shape 1x16x14x14), which counts as a constant" in caplog.text


_KEPT_BY_A_LIBRARY = torch.ones(1, device="meta")


def test_tensors_from_before_the_forward_pass_are_constants() -> None:
    model = Residual(lambda x: x * _KEPT_BY_A_LIBRARY)
    assert len(to_graph(model, input_size=SIZE).targets) == 6


# --- what the recording leaves alone ------------------------------------------------------------------------------


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            noise = torch.rand(4, device="cpu") + torch.empty(4, device="cpu").normal_()
            return self.layer(x).mean((2, 3)) * noise.to(x.device) + torch.arange(4, device=x.device)


def test_threads_that_record_and_draw_do_not_meet() -> None:
    model = Draws()
    expected = to_graph(model)
    torch.manual_seed(3)
    draws = [float(torch.rand(())) for _ in range(2000)]
    init, current = torch.autocast.__init__, torch.utils._device.CURRENT_DEVICE
    graphs: list[Graph] = []
    threads = [threading.Thread(target=lambda: graphs.extend(to_graph(model) for _ in range(5))) for _ in range(3)]
    torch.manual_seed(3)
    for thread in threads:
        thread.start()
    found = [float(torch.rand(())) for _ in range(2000)]
    for thread in threads:
        thread.join()
    assert graphs == [expected] * 15
    assert torch.autocast.__init__ is init
    assert current == torch.utils._device.CURRENT_DEVICE
    assert found == draws


def test_the_inference_mode_changes_nothing() -> None:
    expected = to_graph(timm.create_model("test_resnet"))
    with torch.inference_mode():
        assert to_graph(timm.create_model("test_resnet")) == expected


class Holder(nn.Module):
    """Attributes that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.lock, self.queue, self.module = threading.Lock(), queue.Queue[int](), math
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.nested = {"tensors": [{"scale": self.layer.weight.sum() * 2}], "numbers": (n for n in range(3))}

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            scale = self.nested["tensors"][0]["scale"]  # type: ignore[index]
        return self.layer(x).mean((2, 3)) * scale * self.module.pi


def test_what_cannot_be_copied_is_shared() -> None:
    model = Holder()
    assert names(to_graph(model)) == {"layer.weight", "layer.bias"}
    assert not model.nested["tensors"][0]["scale"].is_meta  # type: ignore[index]
    assert not model.lock.locked()


def test_hooks_that_look_on_leave_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    class Saver:
        def __init__(self) -> None:
            self.outputs: list[Any] = []

        def __call__(self, *args: Any) -> None:
            self.outputs.append(args[-1])

    model = timm.create_model("test_resnet")
    features: dict[str, Any] = {}
    saver, count = Saver(), 0

    def reads_values(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        features["mean"] = output.mean().item()

    model.layer1.register_forward_hook(lambda module, args, output: features.update(layer1=output))
    model.layer2.register_forward_hook(reads_values)
    model.layer3.register_forward_hook(saver)
    model.layer3.register_forward_pre_hook(saver)
    assert to_graph(model) == to_graph(timm.create_model("test_resnet"))
    assert (features, saver.outputs, count) == ({}, [], 0)
    assert "reads_values of module 'layer2' is left out" in caplog.text
    assert "layer1" not in caplog.text


def test_hooks_that_compute_are_recorded() -> None:
    layer, adapter = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
    layer.adapter = adapter
    layer.register_forward_hook(lambda module, args, output: output + adapter(output))
    assert names(to_graph(layer)) == {"weight", "bias", "adapter.weight", "adapter.bias"}


# --- inputs and outputs -------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    count: int = 3


class Custom:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.itself = logits, self


def of_each_other(logits: Tensor) -> Custom:
    one, two = Custom(logits), Custom(logits)
    one.itself, two.itself = two, one
    return one


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Conv2d(3, 4, 1), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x).mean((2, 3)))


@pytest.mark.parametrize(
    "form",
    [Output, Custom, of_each_other, lambda x: SimpleNamespace(x=[x]), lambda x: {x}, lambda x: {"x": deque([x])}],
)
def test_outputs_of_every_form(form: Callable[[Tensor], Any]) -> None:
    assert names(to_graph(Returns(form))) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize(("form", "kind"), [(Slots, "Slots"), (lambda x: None, "NoneType"), (lambda x: 3, "int")])
def test_outputs_without_tensors_name_their_type(form: Callable[[Tensor], Any], kind: str) -> None:
    with pytest.raises(CaptureError, match=rf"forward of Returns returns {kind}, in which there is no tensor"):
        to_graph(Returns(form))


def test_lazy_models_are_explained() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet: run one forward pass"):
        to_graph(nn.Sequential(nn.LazyConv2d(3, 3)))


NONSENSE = {"input_size": "big", "first_conv": 3, "classifier": 3, "notes": 3}


@pytest.mark.parametrize("config", ["resnet", timm.models.PretrainedCfg(input_size=(3, 32, 32)), None, NONSENSE])
def test_descriptions_of_a_model_of_every_form(config: Any) -> None:
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = config
    size = 32 if isinstance(config, timm.models.PretrainedCfg) else 224
    trace = capture(model)
    (image,) = {value.shape for value in trace.operations[0].inputs if value.index in trace.inputs}
    assert image == (1, 3, size, size)


def test_a_model_that_detects_is_read_up_to_its_features() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(CaptureError, match=r"give the part that works without values: model\.backbone"):
        to_graph(model)
    assert len(to_graph(model.backbone, input_size=(3, 320, 320)).targets) > 100


@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish, F.silu, F.relu])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_is_computed_in_place_is_a_new_value_of_its_input(
    function: Callable[..., Tensor], is_transposed: bool
) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            function(x.mT if is_transposed else x, inplace=True)
            return x

    trace = capture(InPlace(), example_input=torch.ones(2, 3))
    last = trace.operations[-1]
    assert last.name == function.__name__
    assert trace.outputs[0] in {value.index for value in last.outputs}


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext"])
def test_skeletons_are_whole_and_share_nothing_that_changes(name: str) -> None:
    model = timm.create_model(name)
    copied, _ = skeleton_of(model)
    assert {k: p.shape for k, p in copied.state_dict().items()} == {k: p.shape for k, p in model.state_dict().items()}
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    for one, other in zip(model.modules(), copied.modules(), strict=True):
        assert type(one) is type(other)
        assert vars(one).keys() == vars(other).keys()
        for value, twin in zip(vars(one).values(), vars(other).values(), strict=True):
            assert value is not twin or not isinstance(value, (dict, list, set, Tensor, nn.Module))
