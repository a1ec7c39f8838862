"""Two processes train together: run by test_networks.py as a script, since each process has to be started anew.

python parallel_fit.py OUT
"""

import sys

import torch
from lightning.fabric import Fabric
from torch import nn

from demur.networks import fit


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def problem():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(256, 1, 6, 6, generator=generator), torch.randint(0, 3, (256,), generator=generator)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def work(fabric, out):
    images, labels = problem()
    ours = network()
    history = fit(ours, images, labels, epochs=2, batch_size=64, optimizer=sgd, fabric=fabric)
    if fabric.is_global_zero:
        torch.save({"weights": ours.state_dict(), "losses": [epoch.loss for epoch in history]}, out)
    # Leave together: a process whose neighbour is gone while it still listens is sometimes aborted.
    fabric.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(work, sys.argv[1])
