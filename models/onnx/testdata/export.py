"""Writes the networks beside it with PyTorch's exporters: the forms in which the
same simple networks arrive from elsewhere. cases.json holds, for each file, an
input x [batch, channels, height, width] (or [batch, features]) and PyTorch's
logits for it, computed in float64.

    pip install torch==2.10.0 onnx onnxscript && python export.py
"""
import json
import pathlib

import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

HERE = pathlib.Path(__file__).parent


class Functional(nn.Module):
    """As people write it by hand: pool before relu, view, dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3)
        self.conv2 = nn.Conv2d(3, 4, 3, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(8, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(self.conv2(x))
        x = x.view(-1, 8)
        x = self.drop(F.relu(self.fc1(x)))
        return self.fc2(x)


def sequential():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 4))


def equal_biases():
    """The exporter writes equal tensors once and names the others by Identity."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, 0.25)
    return net


def dense():
    return nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))


FREE = dict(dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}})
CASES = {
    "functional": (Functional, [1, 10, 8], dict(opset_version=17, **FREE)),
    "opset11": (sequential, [2, 4, 10], dict(opset_version=11, **FREE)),
    "opset20": (sequential, [2, 4, 10], dict(opset_version=20, **FREE)),
    "fixed-batch": (sequential, [2, 4, 10], dict(opset_version=17)),
    "initializers-as-inputs": (sequential, [2, 4, 10], dict(opset_version=11, keep_initializers_as_inputs=True, **FREE)),
    "equal-biases": (equal_biases, [1, 3, 4], dict(opset_version=17, **FREE)),
    "dense": (dense, [9], dict(opset_version=17, **FREE)),
}


def numbers(t):
    return [float(f"{v:.9g}") for v in t.detach().flatten().tolist()]


cases = {}
for seed, (name, (make, shape, options)) in enumerate(CASES.items()):
    torch.manual_seed(seed)
    net = make().eval()
    x = torch.rand(2, *shape)
    torch.onnx.export(net, x, HERE / f"{name}.onnx", input_names=["input"], output_names=["logits"], dynamo=False, **options)
    cases[name] = {"shape": shape, "x": numbers(x), "logits": numbers(net.double()(x.double()))}

# The same network with its weights in float_data, without names, and with constants as nodes.
model = onnx.load(HERE / "opset11.onnx")
for t in model.graph.initializer:
    values = numpy_helper.to_array(t).flatten().tolist()
    t.ClearField("raw_data")
    t.float_data.extend(values)
onnx.save(model, HERE / "float-data.onnx")
cases["float-data"] = cases["opset11"]
constants = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
nodes = list(model.graph.node)
del model.graph.node[:], model.graph.initializer[:]
model.graph.node.extend(constants + nodes)
onnx.save(model, HERE / "constants.onnx")
cases["constants"] = cases["opset11"]

# PyTorch's newer exporter, with a batch of any size and of 2.
for name, make, shape, options in [
    ("dynamo", sequential, [2, 4, 10], dict(dynamic_shapes=[{0: torch.export.Dim("batch")}])),
    ("dynamo-fixed-batch", sequential, [2, 4, 10], {}),
    ("dynamo-functional", Functional, [1, 10, 8], dict(dynamic_shapes=[{0: torch.export.Dim("batch")}])),
]:
    torch.manual_seed(99)
    net = make().eval()
    x = torch.rand(2, *shape)
    torch.onnx.export(net, (x,), HERE / f"{name}.onnx", dynamo=True, external_data=False, input_names=["input"], output_names=["logits"], **options)
    cases[name] = {"shape": shape, "x": numbers(x), "logits": numbers(net.double()(x.double()))}
    model = onnx.load(HERE / f"{name}.onnx")
    for node in model.graph.node:  # stack traces: paths of the machine that ran this
        for entry in [e for e in node.metadata_props if e.key.endswith("stack_trace")]:
            node.metadata_props.remove(entry)
    onnx.save(model, HERE / f"{name}.onnx")

(HERE / "cases.json").write_text(json.dumps(cases) + "\n")
