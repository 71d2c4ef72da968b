"""The same comparison in plain eager PyTorch: SGD, SAM and double backpropagation from their
formulas.

Run by ``python -m benchmarks`` in a process of its own, on an interpreter that has PyTorch; it
needs nothing else. Prints one json document: for each network the seconds per step and round, and
the peak memory where PyTorch counts it.
"""

import argparse
import itertools
import json
import math
import time

import torch
from torch import nn
from torch.nn import functional

RATE, GAMMA, RHO = 0.01, 0.01, 0.05
VOCABULARY = 64


class Residual(nn.Module):
    """One block in each of three stages, as in the JAX network."""

    def __init__(self, width=8):
        super().__init__()
        sizes = [width, width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.first, self.second, self.skip = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (size, out) in enumerate(itertools.pairwise(sizes)):
            stride = 1 if i == 0 else 2
            self.first.append(nn.Conv2d(size, out, 3, stride, padding=1, bias=False))
            self.second.append(nn.Conv2d(out, out, 3, padding=1, bias=False))
            self.skip.append(nn.Conv2d(size, out, 1, stride, bias=False))
        self.head = nn.Linear(sizes[-1], 10, bias=False)

    def forward(self, x):
        """Logits of a batch of images."""
        x = self.stem(x)
        for first, second, skip in zip(self.first, self.second, self.skip, strict=True):
            x = skip(x) + second(functional.gelu(first(functional.gelu(x))))
        return self.head(functional.gelu(x).mean((2, 3)))


class Transformer(nn.Module):
    """Two causal blocks of width 64 with four heads; attention written out, since the fused kernels
    have no second derivative.
    """

    def __init__(self, width=64, layers=2, heads=4):
        super().__init__()
        self.heads = heads
        self.embed, self.position = (
            nn.Embedding(VOCABULARY, width),
            nn.Parameter(torch.randn(512, width) / math.sqrt(512)),
        )
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(VOCABULARY))
        shapes = {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        self.blocks = nn.ModuleList(
            nn.ModuleDict({k: nn.Linear(*s, bias=False) for k, s in shapes.items()})
            for _ in range(layers)
        )

    def attention(self, qkv):
        """Causal attention of queries, keys and values that lie side by side."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~causal, -1e9).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(-2)

    def forward(self, tokens):
        """Logits of the next token at every position."""

        def norm(x):
            return functional.layer_norm(x, x.shape[-1:])

        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block["out"](self.attention(block["qkv"](norm(x))))
            x = x + block["down"](functional.gelu(block["up"](norm(x))))
        return norm(x) @ self.embed.weight.T


def problem(name, device):
    """A network, and a function that returns its loss on made-up data."""
    torch.manual_seed(0)
    if name == "transformer":
        network, tokens = (
            Transformer().to(device),
            torch.randint(VOCABULARY, (16, 33), device=device),
        )
        return network, lambda: functional.cross_entropy(
            network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
    if name == "resnet":
        network, x = Residual(), torch.randn(32, 3, 16, 16)
    elif name == "mlp":
        layers = [
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, 256),
            nn.GELU(),
            nn.Linear(256, 10),
        ]
        network, x = nn.Sequential(*layers), torch.randn(128, 256)
    else:
        network, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 10)), torch.randn(16, 8)
    network, x, y = network.to(device), x.to(device), torch.randint(10, (len(x),), device=device)
    return network, lambda: functional.cross_entropy(network(x), y)


def sgd(parameters, loss):
    """One gradient."""
    _descend(parameters, torch.autograd.grad(loss(), parameters))


def sam(parameters, loss):
    """The gradient at theta + rho g / |g|; the parameters are moved there and back."""
    gradient = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        scale = RHO / torch.sqrt(sum((g * g).sum() for g in gradient))
        step = torch._foreach_mul(gradient, scale)
        torch._foreach_add_(parameters, step)
    ahead = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        torch._foreach_sub_(parameters, step)
    _descend(parameters, ahead)


def double_backpropagation(parameters, loss):
    """The gradient of L + gamma/2 |grad L|^2, by differentiating twice."""
    value = loss()
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    _descend(
        parameters,
        torch.autograd.grad(value + GAMMA / 2 * sum((g * g).sum() for g in gradient), parameters),
    )


def _descend(parameters, gradient):
    with torch.no_grad():
        torch._foreach_add_(parameters, gradient, alpha=-RATE)


STEPS = {"SGD": sgd, "SAM": sam, "DB": double_backpropagation}


def measure(name, rounds, device):
    """Seconds per step and round of each method, run in turn, and its peak memory on a GPU."""

    def timed(step, parameters, loss):
        start = time.perf_counter()
        step(parameters, loss)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    runs = {}
    for method, step in STEPS.items():
        network, loss = problem(name, device)
        runs[method] = (step, list(network.parameters()), loss)
        for _ in range(3):
            timed(*runs[method])
    seconds = {method: [] for method in runs}
    names = list(runs)
    for turn in range(rounds):
        for method in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[method].append(timed(*runs[method]))
    return {
        "seconds": seconds,
        "memory": {method: _peak(run, timed) for method, run in runs.items()}
        if device == "cuda"
        else None,
    }


def _peak(run, timed):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    timed(*run)
    return torch.cuda.max_memory_allocated() - before


def main():
    """Measures the networks named on the command line, and prints json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet", "transformer", "tiny"])
    parser.add_argument(
        "--threads", type=int, default=0, help="threads on the CPU; 0 leaves PyTorch its default"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: measure(name, arguments.rounds, device) for name in arguments.networks}
    print(
        json.dumps(
            {
                "version": torch.__version__,
                "device": device,
                "threads": torch.get_num_threads(),
                "networks": found,
            }
        )
    )


if __name__ == "__main__":
    main()
