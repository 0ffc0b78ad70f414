"""Runs the reference AutoAttack (Croce and Hein 2020) on a network as ONNX and
compares each attack's robust accuracy with Temper's on the same images.

Needs PyTorch, onnx, and https://github.com/fra31/auto-attack on PYTHONPATH:

    temper evaluate --model model.onnx --suite standard --samples 1000 -o json > ours.json
    PYTHONPATH=auto-attack python3 reference.py model.onnx ours.json --samples 1000

Run from this folder, or give --mnist. Accuracies are fractions; 'standard' is
the ensemble, each attack on what survived; with --alone every attack is made on
all images that are right clean. Times are CPU seconds of this process.
"""
import argparse
import gzip
import json
import pathlib
import time

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper


def load(path):
    """The network of an ONNX file as a function of PyTorch: the operators that
    sequential image classifiers use."""
    graph = onnx.load(path).graph
    weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in graph.initializer}
    start, end = graph.input[0].name, graph.output[0].name

    def attributes(node):
        return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}

    def network(x):
        values = dict(weights)
        values[start] = x
        for n in graph.node:
            a, i = attributes(n), [values[name] for name in n.input]
            if n.op_type == "Conv":
                pads = a.get("pads", [0] * 4)
                y = F.conv2d(i[0], *i[1:], stride=a.get("strides", [1, 1]), padding=pads[:2], groups=a.get("group", 1))
            elif n.op_type == "Relu":
                y = F.relu(i[0])
            elif n.op_type == "Sub":
                y = i[0] - i[1]
            elif n.op_type == "Div":
                y = i[0] / i[1]
            elif n.op_type == "Sigmoid":
                y = torch.sigmoid(i[0])
            elif n.op_type == "MaxPool":
                y = F.max_pool2d(i[0], a["kernel_shape"], a.get("strides", a["kernel_shape"]))
            elif n.op_type == "Flatten":
                y = i[0].flatten(1)
            elif n.op_type == "Reshape":
                y = i[0].reshape(i[0].shape[0], -1)
            elif n.op_type == "Gemm":
                y = F.linear(i[0], i[1] if a.get("transB") else i[1].T, i[2])
            else:
                raise SystemExit(f"operator {n.op_type} of node {n.name} is unknown here: add it")
            values[n.output[0]] = y
        return values[end]

    return network


def mnist(folder, n):
    read = lambda name, skip: np.frombuffer(gzip.open(folder / name).read(), np.uint8, offset=skip)
    x = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:n]
    y = read("t10k-labels-idx1-ubyte.gz", 8)[:n]
    return torch.tensor(x.astype(np.float32) / 255), torch.tensor(y.astype(np.int64))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("ours", nargs="?", help="JSON of temper evaluate, to compare with")
    p.add_argument("--epsilon", type=float, default=0.3)
    p.add_argument("--norm", choices=["Linf", "L2"], default="Linf")
    p.add_argument("--samples", type=int, default=1000)
    p.add_argument("--attacks", default="apgd-ce,apgd-t,fab-t,square")
    p.add_argument("--alone", action="store_true", help="every attack on all images")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--mnist", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "dataset" / "mnist")
    o = p.parse_args()
    from autoattack import AutoAttack

    torch.set_num_threads(o.threads)
    network = load(o.model)
    x, y = mnist(o.mnist, o.samples)
    right = network(x).argmax(1) == y
    found, survived = {"clean": right.float().mean().item()}, right.clone()
    for name in o.attacks.split(","):
        attacked = right if o.alone else survived
        aa = AutoAttack(network, norm=o.norm, eps=o.epsilon, seed=0, version="custom", attacks_to_run=[name], device="cpu", verbose=False)
        aa.apgd.n_restarts = aa.fab.n_restarts = aa.apgd_targeted.n_restarts = 1
        started = time.process_time()
        adv = aa.run_standard_evaluation(x[attacked], y[attacked], bs=250)
        seconds = time.process_time() - started
        kept = attacked.clone()
        kept[attacked] = network(adv).argmax(1) == y[attacked]
        survived &= kept
        found[name] = kept.float().mean().item()
        print(f"{name:9} {found[name]:.4f}  {seconds:.1f} CPU seconds", flush=True)
    found["worst case"] = survived.float().mean().item()
    print(f"worst case {found['worst case']:.4f}")
    if o.ours:
        ours = json.load(open(o.ours))
        figures = {a["name"]: a["accuracy"] for a in ours["attacks"]} | {"worst case": ours["robust_accuracy"]}
        for name, theirs in found.items():
            if name in figures:
                print(f"{name:10} ours {figures[name]:.4f} reference {theirs:.4f} difference {100 * (figures[name] - theirs):+.2f} points")


if __name__ == "__main__":
    main()
