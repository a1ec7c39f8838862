"""Engines: where tasks run. `Local` runs them in this process, `Ray` on a Ray cluster."""

import importlib
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from demur.errors import DemurError
from demur.evaluation.keys import Environment
from demur.evaluation.nodes import Task
from demur.evaluation.store import Computed
from demur.hardware import keep_buffers, release_buffers
from demur.progress import message

RETRIES = 3
"""How often the task of a lost worker runs again."""


class Engine(Protocol):
    """Where tasks run."""

    @property
    def capacity(self) -> int:
        """The number of tasks that may be submitted and unfinished."""

    def submit(self, number: int, task: Task) -> None:
        """Take a task."""

    def next(self) -> tuple[int, Computed, float]:
        """Wait for a task to end; give its number, its result and its seconds."""

    def close(self) -> None:
        """Cancel what has not ended."""


class Local:
    """Runs one task at a time in this process."""

    capacity = 1

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Task]] = []

    def submit(self, number: int, task: Task) -> None:
        """Take a task."""
        self._waiting.append((number, task))

    def next(self) -> tuple[int, Computed, float]:
        """Run the first task."""
        number, task = self._waiting.pop(0)
        start = time.monotonic()
        large = {name: value for name, (_, value) in task.shared.items()}
        found = task.function(**task.arguments, **large)
        release_buffers()
        return number, found, time.monotonic() - start

    def close(self) -> None:
        """There is nothing to cancel."""


class Ray:
    """Runs tasks on a Ray cluster. Results come back to this process, which stores them.

    Parameters
    ----------
    environment : Environment
        Of this process. Each task gets as many threads. A worker on another kind of machine causes
        a warning: its rounding may differ.
    address : str, optional
        Of a running cluster, for example "auto" or "ray://host:10001". Without it, Ray starts on
        this machine.

    Raises
    ------
    DemurError
        If ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, environment: Environment, address: str | None = None) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise DemurError(
                "the engine ray needs the package ray: pip install 'demur[ray]'."
            ) from error
        self._ray: Any = ray
        self._environment = environment
        self._started = not ray.is_initialized()
        if self._started:
            options: dict[str, Any] = {"address": address} if address else {}
            if not address:
                options["include_dashboard"] = False
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                said = " ".join(str(error).split())[:200]
                hint = "If the cluster asks for a token, set RAY_AUTH_MODE=token (docs/cluster.md)."
                raise DemurError(
                    f"the Ray cluster {address!r} cannot be reached: {said.rstrip('.')}. {hint}"
                ) from error
        gpus = 1 if environment.device == "cuda" else 0
        cpus = max(1, environment.threads)
        # A task runs on one node: CPUs of two nodes do not add up for it.
        nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        slots = sum(int(one.get("CPU", 0)) // cpus for one in nodes)
        if gpus:
            slots = min(slots, sum(int(one.get("GPU", 0)) for one in nodes))
        if slots < 1:
            self.close()
            raise DemurError(
                f"no node of the Ray cluster has {cpus} CPUs and {gpus} GPUs for one task. "
                "Use fewer threads (OMP_NUM_THREADS), or --device cpu."
            )
        self.capacity = 2 * slots
        self._run: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(run_task)
        self._shared: dict[str, Any] = {}
        self._running: dict[Any, int] = {}
        self._warned = False

    def submit(self, number: int, task: Task) -> None:
        """Send a task to a worker. Large arguments are sent once."""
        large = {}
        for name, (key, value) in task.shared.items():
            if key not in self._shared:
                self._shared[key] = self._ray.put(value)
            large[name] = self._shared[key]
        threads = self._environment.threads
        reference = self._run.remote(task.function, dict(task.arguments), threads, **large)
        self._running[reference] = number

    def next(self) -> tuple[int, Computed, float]:
        """Wait for the first task that ends."""
        (reference,), _ = self._ray.wait(list(self._running), num_returns=1)
        number = self._running.pop(reference)
        try:
            found, seconds, environment = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, DemurError) else error) from error
        except self._ray.exceptions.RayError as error:
            raise DemurError(
                f"a task failed on the Ray cluster {RETRIES + 1} times: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        if environment != self._environment and not self._warned:
            self._warned = True
            message(
                f"warning: a worker computes with {environment}, this process with "
                f"{self._environment}: figures may differ in rounding."
            )
        return number, found, seconds

    def close(self) -> None:
        """Cancel what has not ended, and leave the cluster."""
        for reference in getattr(self, "_running", {}):
            self._ray.cancel(reference, force=True)
        if self._started:
            self._ray.shutdown()


def run_task(
    function: Any, arguments: dict[str, Any], threads: int, **large: Any
) -> tuple[Computed, float, Environment]:
    """Run a task on a worker."""
    # A worker process belongs to this job alone, so the setting reaches no process of a user.
    keep_buffers()
    if threads:
        torch.set_num_threads(threads)
    start = time.monotonic()
    with TemporaryDirectory() as scratch:
        place = arguments.get("checkpoint")
        if place is not None and not Path(place).parent.is_dir():
            # The worker does not see the store of the driver.
            arguments["checkpoint"] = str(Path(scratch, Path(place).name))
        found = function(**arguments, **large)
    seconds = time.monotonic() - start
    return found, seconds, Environment.here(arguments.get("device", "cpu"))
