#!/usr/bin/env python3
"""Temper beside PyTorch, in one run: images per second of an attack step, an
optimiser step and a forward pass on the networks of models/zoo.

    pip install torch
    go build -o bin/ ./runners/temper
    python3 bench/pytorch.py --temper bin/temper

PyTorch gets its best of: float32 or bfloat16 autocast; contiguous or
channels_last memory; eager, or torch.compile of the faster half of those. What
cannot run is left out, and said so. Both sides take the same number of threads,
the best of five rounds, and by turns, since machines are shared and noisy:
believe the ratios. Beside other processes PyTorch, whose threads wait for each
other in every operator, suffers more than Temper: compare by --cpu-time there.
"""
import argparse
import json
import os
import subprocess
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--temper", default="bin/temper", help="the temper program")
parser.add_argument("--network", default="wong,paper,trades")
parser.add_argument("--batch", default="128,512")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--seconds", type=float, default=1.0, help="how long to measure each figure")
parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, both sides on one thread: where other processes run too")
parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
parser.add_argument("--json", help="file for every figure, one JSON object a line")
options = parser.parse_args()
if options.cpu_time:
    options.threads = 1
clock = time.process_time if options.cpu_time else time.perf_counter
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(options.threads)
ROUNDS = 5
EPSILON, ALPHA = 0.3, 0.01


def network(name):
    """The zoo's network of that name, with random weights."""
    torch.manual_seed(1)
    conv = lambda i, o, k, **kw: [nn.Conv2d(i, o, k, **kw), nn.ReLU()]
    dense = lambda i, o: [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*{
        "wong": lambda: conv(1, 16, 4, stride=2, padding=1) + conv(16, 32, 4, stride=2, padding=1)
        + [nn.Flatten()] + dense(1568, 100) + [nn.Linear(100, 10)],
        "paper": lambda: conv(1, 32, 3, padding=1) + [nn.MaxPool2d(2)] + conv(32, 64, 3, padding=1) + [nn.MaxPool2d(2)]
        + [nn.Flatten()] + dense(3136, 128) + [nn.Linear(128, 10)],
        "trades": lambda: conv(1, 32, 3) + conv(32, 32, 3) + [nn.MaxPool2d(2)] + conv(32, 64, 3) + conv(64, 64, 3) + [nn.MaxPool2d(2)]
        + [nn.Flatten()] + dense(1024, 200) + dense(200, 200) + [nn.Linear(200, 10)],
        "madry": lambda: conv(1, 32, 5, padding=2) + [nn.MaxPool2d(2)] + conv(32, 64, 5, padding=2) + [nn.MaxPool2d(2)]
        + [nn.Flatten()] + dense(3136, 1024) + [nn.Linear(1024, 10)],
    }[name]())


def steps(name, batch, bf16, channels_last, compiled):
    """The three things to measure: dictionary of functions."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    clean = torch.rand(batch, 1, 28, 28).to(memory_format=memory)
    labels = torch.randint(0, 10, (batch,))
    cast = lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)

    attacked = network(name).to(memory_format=memory)
    for p in attacked.parameters():
        p.requires_grad_(False)
    trained = network(name).to(memory_format=memory)
    served = network(name).to(memory_format=memory).eval()
    optimiser = torch.optim.Adam(trained.parameters(), lr=1e-6, fused=True)
    if compiled:
        attacked, trained, served = torch.compile(attacked), torch.compile(trained), torch.compile(served)
    x = clean.clone()

    def attack():
        nonlocal x
        x.requires_grad_(True)
        with cast():
            loss = F.cross_entropy(attacked(x).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x = torch.clamp(torch.min(torch.max(x + ALPHA * gradient.sign(), clean - EPSILON), clean + EPSILON), 0, 1)

    def train():
        optimiser.zero_grad(set_to_none=True)
        with cast():
            loss = F.cross_entropy(trained(clean).float(), labels)
        loss.backward()
        optimiser.step()

    def infer():
        with torch.inference_mode(), cast():
            served(clean)

    return {"attack": attack, "train": train, "infer": infer}


def rate(step, batch):
    """Images per second: the best of ROUNDS rounds after one that warms up."""
    for _ in range(3):
        step()
    best = 0.0
    for _ in range(ROUNDS):
        start, n = clock(), 0
        while n == 0 or clock() - start < options.seconds / ROUNDS:
            step()
            n += 1
        best = max(best, n * batch / (clock() - start))
    return best


def ours(name, batch):
    """Temper's best rate and its path, for each of attack, train, infer."""
    command = [options.temper, "bench", "-o", "json", "-q", "--network", name, "--batch", str(batch), "--seconds", str(options.seconds)] + ["--cpu-time"] * options.cpu_time
    out = subprocess.run(command, env={**os.environ, "GOMAXPROCS": str(options.threads)}, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {}
    for line in out.splitlines():
        m = json.loads(line)
        record(m)
        if m["images_per_second"] > found.get(m["what"], (0, ""))[0]:
            found[m["what"]] = (m["images_per_second"], m["path"])
    return found


file = open(options.json, "w") if options.json else None


def record(figure):
    if file:
        file.write(json.dumps(figure) + "\n")
        file.flush()


def main():
    print(f"PyTorch {torch.__version__}, {options.threads} threads", file=sys.stderr)
    print("| network | batch | step | Temper, images/s | path | PyTorch, images/s | its best | ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.network.split(","):
        for batch in map(int, options.batch.split(",")):
            best, fastest = ours(name, batch), {}

            def measure(bf16, channels_last, compiled, only=None):
                how = " ".join(filter(None, ["bf16" if bf16 else "fp32", "channels_last" if channels_last else "", "compile" if compiled else ""]))
                for what, step in steps(name, batch, bf16, channels_last, compiled).items():
                    if only and what != only:
                        continue
                    try:
                        images = rate(step, batch)
                    except Exception as problem:  # left out, as the documentation says
                        print(f"{name} {batch} {what} {how}: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
                        continue
                    record({"network": name, "what": what, "path": "pytorch " + how, "batch": batch, "images_per_second": images})
                    fastest.setdefault(what, []).append((images, how, (bf16, channels_last)))

            for bf16 in (False, True):
                for channels_last in (False, True):
                    measure(bf16, channels_last, False)
            if not options.no_compile:
                for what in list(fastest):
                    for _, _, settings in sorted(fastest[what], reverse=True)[:2]:
                        torch._dynamo.reset()
                        measure(*settings, True, only=what)
            again = ours(name, batch)
            for what in ("attack", "train", "infer"):
                (images, path), (theirs, how, _) = max(best[what], again[what]), max(fastest[what])
                print(f"| {name} | {batch} | {what} | {images:,.0f} | {path} | {theirs:,.0f} | {how} | {images / theirs:.2f} |", flush=True)


main()
