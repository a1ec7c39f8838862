"""Two processes train together: run by test_training.py as a script, which starts each anew.

python parallel_fit.py OUT
"""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from demur.training import fit


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def problem():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(256, 1, 6, 6, generator=generator)
    return images, torch.randint(0, 3, (256,), generator=generator)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def train(*data, **options):
    """Weights and epochs after two epochs, as plain values."""
    trained = network()
    history = fit(
        trained,
        *data,
        epochs=2,
        optimizer=sgd,
        validation=problem(),
        precision="float32",
        **options,
    )
    epochs = [[one.loss, one.accuracy, one.validation_loss] for one in history]
    return {"weights": trained.state_dict(), "epochs": epochs}


def work(fabric, out):
    images, labels = problem()
    found = {
        "tensors": train(
            images, labels, batch_size=64, checkpoint=Path(out + ".fit"), fabric=fabric
        )
    }
    dataset = TensorDataset(images, labels)
    sampler = DistributedSampler(dataset, fabric.world_size, fabric.global_rank, shuffle=False)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    found["loader"] = train(loader, fabric=fabric)
    try:
        train(DataLoader(dataset, batch_size=32), fabric=fabric)
    except ValueError as error:
        found["refused"] = str(error)
    if fabric.is_global_zero:
        torch.save(found, out)
    # Leave together: a process whose neighbour is gone while it still listens is sometimes aborted.
    fabric.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(work, sys.argv[1])
