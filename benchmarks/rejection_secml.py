"""Speed of attacking deep neural rejection with SecML, the library of its authors.

SecML does not work with numpy 2 and needs its own environment (Python up to 3.11):

    pip install --only-binary :all: numpy==1.23.5 scipy==1.10.1 scikit-learn==1.2.2 \\
        matplotlib==3.7.5 joblib python-dateutil
    pip install --no-deps secml && pip install torch
    python benchmarks/rejection_secml.py FEATURES.npz NETWORK.pt

`benchmarks/rejection.py --only attack --network NETWORK.pt --keep FEATURES.npz` writes both files
and prints the figures of demur on the same network and images. Run the two one after the other.
This prints images times steps a second, for the gradient that SecML's attacks descend. As in these
attacks, the images are processed one at a time.
"""

import sys
import time

import numpy as np
import torch
from secml.array import CArray
from secml.ml.classifiers import CClassifierSVM
from secml.ml.classifiers.multiclass import CClassifierMulticlassOVA
from secml.ml.classifiers.pytorch.c_classifier_pytorch import CClassifierPyTorch
from secml.ml.classifiers.reject import CClassifierDNR
from secml.ml.kernels import CKernelRBF
from torch import nn

LAYERS = ["8", "12", "15"]
IMAGES = 5


def network(path: str) -> nn.Sequential:
    """Build the rejection paper's network, the same as demur.networks.dnr_cnn, and load it."""

    def double(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    dense = [
        nn.Linear(3136, 200),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    ]
    module = nn.Sequential(*double(1, 32), *double(32, 64), nn.Flatten(), *dense)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


def main(kept: str, weights: str) -> None:
    """Measure and print."""
    arrays = np.load(kept)
    images, labels, few = (arrays[name] for name in ("images", "labels", "few"))
    module = network(weights)
    options = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "input_shape": (1, 28, 28),
    }
    inner = CClassifierPyTorch(
        model=module, pretrained=True, pretrained_classes=CArray.arange(10), **options
    )

    def machines() -> CClassifierMulticlassOVA:
        return CClassifierMulticlassOVA(CClassifierSVM, C=0.1, kernel=CKernelRBF(gamma=0.01))

    deep = CClassifierDNR(machines(), machines(), inner, LAYERS, threshold=0.9)
    start = time.perf_counter()
    deep.fit(CArray(images.reshape(len(images), -1).astype(np.float64) / 255), CArray(labels))
    fitted = time.perf_counter() - start
    towards = CArray.zeros(11)
    towards[3] = 1
    points = CArray(few[:IMAGES].reshape(IMAGES, -1).astype(np.float64))
    start = time.perf_counter()
    for place in range(IMAGES):
        deep.forward(points[place, :], caching=True)
        deep.backward(towards)
    each = (time.perf_counter() - start) / IMAGES
    print(
        f"SecML: {len(images):,} images fitted in {fitted:.1f} s; "
        f"{1 / each:.2f} images x steps a second",
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
