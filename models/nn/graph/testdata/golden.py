"""Writes the golden networks and gradients beside it: PyTorch is the independent
reference that the graph, the forward pass and the ONNX import are compared with.

    pip install torch==2.5.1 onnx && python golden.py

Each case is NAME.onnx (PyTorch's exporter, float32 weights) and NAME.json with
input x [batch, channels, height, width], labels, logits [batch, classes], the
mean cross-entropy loss over the batch, its gradient dx with respect to x, and
the gradient of each parameter in PyTorch's layout (convolution [out, in,
height, width], dense [out, in]). Everything is computed in float64 from the
float32 weights, so the reference's own rounding is out of the picture.
"""
import json
import pathlib

import torch
from torch import nn

HERE = pathlib.Path(__file__).parent
BATCH = 3


def conv(i, o, k, s=1, p=0):
    return [nn.Conv2d(i, o, k, stride=s, padding=p), nn.ReLU()]


# The four networks of the zoo, narrow, on odd sizes.
CASES = {
    "wong": ([1, 13, 11], lambda: conv(1, 4, 4, 2, 1) + conv(4, 6, 4, 2, 1)
             + [nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 10)]),
    "paper": ([3, 11, 13], lambda: conv(3, 4, 3, 1, 1) + [nn.MaxPool2d(2)] + conv(4, 5, 3, 1, 1)
              + [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 10)]),
    "trades": ([1, 17, 19], lambda: conv(1, 3, 3) + conv(3, 4, 3) + [nn.MaxPool2d(2)] + conv(4, 5, 3) + conv(5, 6, 3)
               + [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 10)]),
    "madry": ([3, 9, 10], lambda: conv(3, 4, 5, 1, 2) + [nn.MaxPool2d(2)] + conv(4, 5, 5, 1, 2)
              + [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 10)]),
}


def numbers(t):
    return [float(f"{v:.9g}") for v in t.detach().flatten().tolist()]


for seed, (name, (shape, layers)) in enumerate(CASES.items()):
    torch.manual_seed(seed)
    net = nn.Sequential(*layers())
    # Biases above zero and wide weights keep most ReLUs open in networks this narrow.
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
            if p.dim() == 1:
                p.abs_()
    x = torch.rand(BATCH, *shape)
    labels = torch.randint(0, 10, (BATCH,))
    torch.onnx.export(net, x, HERE / f"{name}.onnx", opset_version=17, input_names=["input"],
                      output_names=["logits"], dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}})
    net = net.double()
    x = x.double().requires_grad_()
    logits = net(x)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    golden = {
        "layout": "NCHW", "batch": BATCH, "shape": shape, "x": numbers(x), "labels": labels.tolist(),
        "logits": numbers(logits), "loss": loss.item(), "dx": numbers(x.grad),
        "parameters": [{"name": n, "shape": list(p.shape), "gradient": numbers(p.grad)} for n, p in net.named_parameters()],
    }
    (HERE / f"{name}.json").write_text(json.dumps(golden) + "\n")
    print(name, shape, "loss", loss.item(), "open", (x.grad != 0).double().mean().item())
