"""Writes imported/: networks as PyTorch's exporters write them, each NAME.onnx
with NAME.json, what PyTorch computes for it in float64: the logits for an
input x [batch, channels, height, width], and the gradients of the summed
cross-entropy with respect to x and to the weights, batch normalisations folded
into the convolutions before them, in the order in which the network uses them.

    pip install torch==2.15.0 onnx onnxscript && python imported.py [NAMES...]
"""
import copy
import json
import pathlib
import sys
import warnings

import onnx
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

warnings.filterwarnings("ignore")
OUT = pathlib.Path(__file__).parent / "imported"
OUT.mkdir(exist_ok=True)


class LeNet(nn.Module):
    """LeCun 1998, as people write it: tanh, average pools, view by the batch's size."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 20), nn.Linear(20, 14), nn.Linear(14, 10)

    def forward(self, x):
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = torch.tanh(self.fc1(x))
        return self.fc3(torch.tanh(self.fc2(x)))


class VGG(nn.Module):
    """Simonyan 2014, with batch normalisation, on small colour images."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (4, "M", 6, 6, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(24, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Block(nn.Module):
    """He 2015: the basic block, its shortcut a strided 1x1 convolution."""

    def __init__(self, channels, width, stride, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, stem=False, groups=1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem else nn.Identity()
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2, groups))
        self.average, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 6)

    def forward(self, x):
        x = self.pool(F.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(self.average(self.blocks(x)), 1))


class MobileNet(nn.Module):
    """Sandler 2018: inverted residuals, ReLU6, depthwise convolutions."""

    def __init__(self):
        super().__init__()

        def conv(i, o, k, s=1, g=1):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU6(inplace=True))

        self.stem = conv(3, 6, 3, 2)
        self.inverted = nn.Sequential(conv(6, 12, 1), conv(12, 12, 3, 1, 12), nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.last, self.fc = conv(6, 10, 1), nn.Linear(10, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.last(x + self.inverted(x))
        return self.fc(x.mean([2, 3]))


class DenseNet(nn.Module):
    """Huang 2017: normalisation and ReLU before the convolutions, whose outputs are joined."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.conv(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        x = F.avg_pool2d(F.relu(self.bn(x)), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixed(nn.Module):
    """What the others leave out: input normalisation, squeeze and excitation, channel shuffle, dilation, uneven borders, other activations, pools and arithmetic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.25, 0.24, 0.26]).view(1, 3, 1, 1))
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.down, self.up = nn.Linear(8, 3), nn.Linear(3, 8)
        self.conv3 = nn.Conv2d(8, 6, 3, padding="same")
        self.weight = nn.Parameter(torch.empty(24, 5))
        self.bias = nn.Parameter(torch.empty(5))
        nn.init.normal_(self.weight), nn.init.normal_(self.bias)

    def forward(self, x):
        x = (x - self.mean) / self.std
        x = F.leaky_relu(self.conv1(self.pad(x)), 0.1)
        n, c, h, w = x.shape
        x = x.view(-1, 2, 4, h, w).transpose(1, 2).reshape(-1, c, h, w)
        x = torch.clamp(self.conv2(x), min=-0.3, max=0.8)
        s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        x = x * s.unsqueeze(-1).unsqueeze(-1)
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = torch.tanh(self.conv3(x)) * 2 - 0.25
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - F.avg_pool2d(x, 3, 1, 1)
        x = F.max_pool2d(F.relu(x), 3, 2, 1)
        return torch.matmul(x.permute(0, 2, 3, 1).reshape(-1, 24), self.weight) + self.bias


class Probabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)
        self.bn1, self.fc = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.conv(self.bn(x)))
        return F.softmax(self.fc(self.bn1(x.flatten(1))), 1)


FREE = dict(dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}})
KEEP = dict(training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)  # keeps batch normalisations as they are
CASES = {
    "lenet-opset11": (LeNet, [1, 18, 18], dict(opset_version=11, **FREE)),
    "lenet-opset20": (LeNet, [1, 18, 18], dict(opset_version=20, **FREE)),
    "lenet-dynamo": (LeNet, [1, 18, 18], None),
    "vgg-opset11-unfolded": (VGG, [3, 8, 8], dict(opset_version=11, **KEEP, **FREE)),
    "vgg-opset17": (VGG, [3, 8, 8], dict(opset_version=17, **FREE)),
    "vgg-dynamo": (VGG, [3, 8, 8], None),
    "resnet-opset13": (ResNet, [3, 10, 10], dict(opset_version=13, **FREE)),
    "resnet-opset17-unfolded": (lambda: ResNet(stem=True, groups=2), [3, 17, 15], dict(opset_version=17, **KEEP, **FREE)),
    "resnet-dynamo": (ResNet, [3, 10, 10], None),
    "mobilenet-opset11": (MobileNet, [3, 11, 11], dict(opset_version=11, **FREE)),
    "mobilenet-opset18-unfolded": (MobileNet, [3, 11, 11], dict(opset_version=18, **KEEP, **FREE)),
    "mobilenet-dynamo": (MobileNet, [3, 11, 11], None),
    "densenet-opset17-unfolded": (DenseNet, [1, 7, 7], dict(opset_version=17, **KEEP, **FREE)),
    "mixed-opset12": (Mixed, [3, 16, 12], dict(opset_version=12, **FREE)),
    "mixed-opset19": (Mixed, [3, 16, 12], dict(opset_version=19, **FREE)),
    "mixed-dynamo": (Mixed, [3, 16, 12], None),
    "probabilities-opset17-unfolded": (Probabilities, [2, 4, 4], dict(opset_version=17, **KEEP, **FREE)),
}


def numbers(t):
    return [float(f"{v:.8g}") for v in t.detach().flatten().tolist()]


def randomise(net):
    """Statistics and factors as training leaves them, not all 0 and 1."""
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.normal_(m.bias, 0, 0.3)
            nn.init.normal_(m.running_mean, 0, 0.3), nn.init.uniform_(m.running_var, 0.3, 1.5)


def folded(net):
    """Convolutions with the batch normalisation that follows each, in Sequential and Block order."""
    net = copy.deepcopy(net).double()
    for parent in list(net.modules()):
        names = [name for name, _ in parent.named_children()]
        for a, b in zip(names, names[1:]):
            conv, bn = getattr(parent, a), getattr(parent, b)
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and not isinstance(net, (DenseNet, Probabilities)):
                fused = fuse_conv_bn_eval(conv, bn)
                setattr(parent, a, fused), setattr(parent, b, nn.Identity())
    return net.requires_grad_()


for seed, (name, (make, shape, options)) in enumerate(CASES.items()):
    if not name.startswith(tuple(sys.argv[1:]) or ""):
        continue
    torch.manual_seed(seed)
    net = make()
    randomise(net)
    net.eval()
    x = torch.rand(2, *shape)
    path = OUT / f"{name}.onnx"
    if options is None:
        torch.onnx.export(net, (x,), path, dynamo=True, external_data=False, input_names=["input"], output_names=["logits"], dynamic_shapes=[{0: torch.export.Dim("batch")}])
        model = onnx.load(path)
        for node in model.graph.node:  # stack traces: paths of the machine that ran this
            for entry in [e for e in node.metadata_props if e.key.endswith("stack_trace")]:
                node.metadata_props.remove(entry)
        onnx.save(model, path)
    else:
        torch.onnx.export(net, x, path, input_names=["input"], output_names=["logits"], dynamo=False, **options)

    reference = folded(net)
    used = []
    for m in reference.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            m.register_forward_hook(lambda m, *_: used.append(m))
    x = x.double().requires_grad_()
    labels = torch.arange(len(x))
    logits = reference(x)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = []
    for m in used:
        weight = m.weight.grad
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):  # with respect to the factor that it comes to
            weight = weight * torch.sqrt(m.running_var + m.eps) + m.running_mean * m.bias.grad
        gradients += [weight, m.bias.grad]
    if isinstance(net, Mixed):  # its last weight as that of a Linear on [N, channels, height, width]
        gradients += [reference.weight.grad.view(2, 2, 6, 5).permute(3, 2, 0, 1).flatten(1), reference.bias.grad]
    (OUT / f"{name}.json").write_text(json.dumps({
        "shape": shape, "batch": len(x), "x": numbers(x), "labels": labels.tolist(), "logits": numbers(logits), "dx": numbers(x.grad),
        "parameters": [{"shape": list(g.shape), "gradient": numbers(g)} for g in gradients],
    }) + "\n")
    print(name, path.stat().st_size, (OUT / f"{name}.json").stat().st_size, [n.op_type for n in onnx.load(path).graph.node])
