"""Runs the reference AutoAttack (Croce and Hein 2020) on a network as ONNX and
compares each attack's robust accuracy and time with Temper's on the same images.

Needs PyTorch, onnx, and https://github.com/fra31/auto-attack on PYTHONPATH:

    PYTHONPATH=auto-attack python3 reference.py model.onnx --temper temper --samples 1000

Accuracies are fractions: of the ensemble, each attack on what survived, or with
--alone of every attack on all images. Seconds are those of the attack, by the
clock, of as many threads in both; on a machine with other work compare the CPU
seconds, in which Temper's start and its security curve are included.
"""
import argparse
import gzip
import json
import os
import pathlib
import resource
import subprocess
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


def temper(o):
    """Temper's accuracy and seconds by attack."""
    attacks = ["--attacks", o.attacks] if o.alone else ["--suite", "standard", "--checks=false"]
    run = subprocess.run(
        [o.temper, "evaluate", "--model", o.model, "--norm", o.norm.lower(), "--epsilon", str(o.epsilon), "--samples", str(o.samples), "-o", "json"] + attacks,
        env=os.environ | {"GOMAXPROCS": str(o.threads)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    made = [json.loads(line) for line in run.stderr.splitlines() if '"made"' in line]
    seconds = {}
    for m in made:
        seconds[m["attack"]] = seconds.get(m["attack"], 0) + m["seconds"]
    report = json.loads(run.stdout)
    accuracy = {a["name"]: a["accuracy"] for a in report["attacks"]} | {"clean": report["clean_accuracy"], "worst case": report["robust_accuracy"]}
    return accuracy, seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--temper", help="the program to compare with")
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
    accuracy, seconds, survived = {"clean": right.float().mean().item()}, {}, right.clone()
    cpu = time.process_time()
    for name in o.attacks.split(","):
        attacked = right if o.alone else survived
        aa = AutoAttack(network, norm=o.norm, eps=o.epsilon, seed=0, version="custom", attacks_to_run=[name], device="cpu", verbose=False)
        aa.apgd.n_restarts = aa.fab.n_restarts = aa.apgd_targeted.n_restarts = 1
        started = time.perf_counter()
        adv = aa.run_standard_evaluation(x[attacked], y[attacked], bs=250)
        seconds[name] = time.perf_counter() - started
        kept = attacked.clone()
        kept[attacked] = network(adv).argmax(1) == y[attacked]
        survived &= kept
        accuracy[name] = kept.float().mean().item()
    accuracy["worst case"], seconds["worst case"] = survived.float().mean().item(), sum(seconds.values())
    cpu = time.process_time() - cpu
    ours, took = temper(o) if o.temper else ({}, {})
    took["worst case"] = sum(took.values())
    for name, theirs in accuracy.items():
        line = f"{name:10}  AutoAttack {theirs:.4f} {seconds.get(name, 0):8.1f} s"
        if name in ours:
            line += f"  Temper {ours[name]:.4f} {took.get(name, 0):8.1f} s  {100 * (ours[name] - theirs):+.2f} points"
        if took.get(name):
            line += f"  {seconds[name] / took[name]:.2f} times as fast"
        print(line)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"CPU seconds AutoAttack {cpu:.1f}, Temper {used.ru_utime + used.ru_stime:.1f}")


if __name__ == "__main__":
    main()
