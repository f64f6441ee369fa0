"""The Ray on which a sweep is spread: reached or started, and what each worker gets of it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from attnlens.errors import InputError

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# The switch by which Ray keeps to the loopback interface, on Linux too; its processes inherit it.
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True)
class Pool:
    """How many workers, and the share of CPUs and GPUs that each of them takes."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def on(cls, nodes: Sequence[Mapping[str, float]], workers: int | None, gpus: float) -> Pool:
        """Workers on machines with these resources; as many CPUs each as leave room for all."""
        if (workers is not None and workers < 1) or gpus < 0 or (gpus > 1 and gpus % 1):
            raise InputError(
                f"workers={workers} and gpus={gpus:g}: give 1 worker or more, and a share of a GPU "
                "(0.5) or a whole number of them for each; 0 for none."
            )
        if workers is None:
            workers = 1
            if gpus:
                cards = [int(node.get("GPU", 0)) for node in nodes]
                workers = sum(n * int(1 / gpus) if gpus <= 1 else int(n // gpus) for n in cards)
        if gpus > max((node.get("GPU", 0) for node in nodes), default=0) or not workers:
            raise InputError(
                f"Each worker is to have {gpus:g} GPU, and no machine of the Ray cluster has that: "
                "give gpus=0 to compute on CPUs, or add a machine with GPUs."
            )
        cpus = [node.get("CPU", 0) for node in nodes]
        shares = [*range(int(max(cpus, default=1)), 0, -1), *(2.0**-i for i in range(1, 8))]
        fits = (share for share in shares if sum(int(n / share) for n in cpus) >= workers)
        return cls(workers, float(next(fits, shares[-1])), gpus)

    @property
    def options(self) -> dict[str, Any]:
        """For Ray Data. CPUs beside GPUs are not reserved: a worker there waits for its GPU."""
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}


@contextmanager
def connected(address: str) -> Generator[Any]:
    """Ray, imported and connected; one that we start ends with us and hears this machine alone."""
    local = address == "local"
    with _environment(_QUIET | (_ALONE if local else {})):
        ray = _imported()
        started = not ray.is_initialized()
        if started:
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if local:
                options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            try:
                _knock(address)
                with _loopback() if local else nullcontext():
                    ray.init(address=address, **options)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"Ray cannot be reached at {address!r} ({str(error).strip().splitlines()[0]}). "
                    "Give the address of a running cluster, or 'local'; where it asks for a "
                    "token, set RAY_AUTH_MODE=token."
                ) from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nobody answers at `host:port`; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _loopback() -> Generator[None]:
    """Have Ray take 127.0.0.1 at its word: it reads the switch when it is first imported."""
    constants: Any = import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _imported() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise InputError(
            "Spreading a sweep needs Ray, which is not installed: pip install 'attnlens[ray]'."
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    """Environment variables for a while; those that the user has set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
