"""The connection to a Ray cluster, with a limit, and what the cluster has."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError

from whet.cluster.placement import Node
from whet.errors import ClusterError, ConfigError

REACH_S = 10.0
"""Seconds for the cluster's address to take a connection."""
TOKEN = "Ray's token of the cluster is another one; copy ~/.ray/auth_token of its head node here, or set RAY_AUTH_TOKEN"


class Lost(ClusterError):
    """An actor has died, or does not answer."""


@contextmanager
def connected(address: str, namespace: str) -> Iterator[None]:
    """Be a program of the cluster at `address`, `auto` for the one that this machine belongs to.

    Raises ConfigError where there is none, ClusterError where it does not let us in.
    """
    told = f"cluster.address is {address!r}"
    asked = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if asked != "auto":
        _reach(asked, told)
    joined(asked, namespace)
    try:
        yield
    finally:
        ray.shutdown()


def joined(address: str, namespace: str) -> None:
    """Join a cluster that can be reached, for as long as this program runs. Raises ConfigError or ClusterError."""
    if ray.is_initialized():
        return
    told, before = f"cluster.address is {address!r}", signal.getsignal(signal.SIGTERM)
    try:
        # Output of the ranks comes through their actors; what Ray itself has to say is for those who look after it.
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="error")
    except AuthenticationError as error:
        raise ClusterError(f"{told}, but it does not let us in: {TOKEN}") from error
    except ConnectionError as error:
        raise ConfigError(
            f"{told}, but this machine belongs to no Ray cluster; start one with ray start --head (and ray start "
            "--address=… on the other machines), or give its address as host:port"
        ) from error
    except (RayError, RuntimeError, SystemExit) as error:  # Ray ends programs that cannot reach its head
        raise ClusterError(f"{told}, but Ray cannot join it: {first_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray sets a handler of its own, which an orderly end would come back to.
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _reach(address: str, told: str) -> None:
    """Raises ConfigError where nothing listens: Ray itself would wait for minutes, and then end the program."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{told}, and RAY_ADDRESS is {address!r}; set that to host:port of the cluster, or unset it")
    hosts = [host] if host not in ("127.0.0.1", "localhost") else [host, ray.util.get_node_ip_address()]
    for number, one in enumerate(hosts):
        try:
            socket.create_connection((one, int(port)), timeout=REACH_S).close()
            return
        except OSError as error:
            if number == len(hosts) - 1:
                raise ConfigError(
                    f"{told}, but nothing answers there ({error}); see what ray start --head said, and whether the "
                    "port is open between the machines"
                ) from error


def nodes() -> list[Node]:
    """The nodes that are alive."""
    found = [node for node in ray.nodes() if node["Alive"]]
    return [Node(one["NodeID"], one["NodeManagerAddress"], one["Resources"]) for one in found]


def ask(what: str, asked: dict[str, Any], limit_s: float) -> list[Any]:
    """What actors answer, by their names. Raises Lost for those that have died, or do not answer in time."""
    deadline = time.monotonic() + limit_s
    answers = []
    for name, ref in asked.items():
        try:
            answers.append(ray.get(ref, timeout=max(0.0, deadline - time.monotonic())))
        except GetTimeoutError:
            raise Lost(f"{name} was asked {what}, and gave no answer within {limit_s:.0f} s") from None
        except RayError as error:
            raise Lost(f"{name} was lost when asked {what}: {first_line(error)}") from error
    return answers


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
