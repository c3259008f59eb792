"""The Ray cluster that a run uses: reached or started, and large enough."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from urllib.parse import urlsplit

import ray

from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.errors import UserError

START_TRIES = 3
# With this RAY_ADDRESS, or none, Ray starts on this machine.
HERE = "local"


@contextmanager
def ray_cluster(config: RunConfig) -> Iterator[None]:
    """Ray for the duration of the block: the cluster that RAY_ADDRESS names, or one on this machine.

    Raises:
        UserError: the cluster cannot be reached, or cannot hold the workers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run needs no network
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # the log should hold whole tracebacks
    ours = not ray.is_initialized()
    if ours:
        address = cluster_address()
        _connect(address)
    try:
        _check_resources(config, may_grow=ours and address != HERE)
        yield
    finally:
        if ours:
            ray.shutdown()


def cluster_address() -> str:
    """What RAY_ADDRESS says, where something answers there within a second; HERE where it says nothing.

    Raises:
        UserError: it is not the address of a cluster, or nothing answers.
    """
    address = os.environ.get("RAY_ADDRESS") or HERE
    if address in (HERE, "auto"):  # nothing to reach, or Ray looks by itself
        return address
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise UserError(f"RAY_ADDRESS {address} must be HOST:PORT of the cluster; from elsewhere, use ray job submit")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host, port), timeout=1).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS {address} cannot be reached ({error}); unset it to train on this machine"
        ) from error
    return address


def _connect(address: str) -> None:
    for attempt in range(1, START_TRIES + 1):
        try:
            _aside(partial(ray.init, address, include_dashboard=False, logging_level=logging.WARNING))
        except ConnectionError as error:
            raise UserError(
                f"RAY_ADDRESS {address}: no Ray cluster answers; unset it to train on this machine"
            ) from error
        except Exception as error:
            if "Version mismatch" in str(error):
                words = " ".join(str(error).split())
                raise UserError(
                    f"RAY_ADDRESS {address}: the cluster has other versions than this driver: {words}"
                ) from error
            # Ray gives a node that it starts here 30 s, and has no type of its own for one that takes longer.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == START_TRIES:
                raise UserError(f"Ray did not start within 30 s, {attempt} times; this machine is too busy") from error
        else:
            _take_back_sigterm()
            return


def _take_back_sigterm() -> None:
    """Let what Python has for it be all: with Ray's own handler, a process that takes longer to end is aborted.

    That one is absl's, which Ray puts in every process (`InstallFailureSignalHandler`, 2.60, util/logging.cc). It gives
    three seconds from the signal on.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _aside(start: Callable[[], object]) -> None:
    """Start Ray in a thread of its own: in the main one it takes SIGTERM, to end the process without a word.

    The thread stays, because what Ray starts on this machine dies with the thread that started it.
    """
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(start())
        except BaseException as error:  # noqa: BLE001 -- raised where the caller waits
            done.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="ray", daemon=True).start()
    done.result()


def _check_resources(config: RunConfig, may_grow: bool) -> None:
    has = ray.cluster_resources()
    # An autoscaler may add nodes that are not there yet; Ray Train asks it the same way. Not every version of Ray knows
    # of it, so a cluster gets its chance: waiting for workers has a limit of its own.
    may_have = ray._private.state.state.get_max_resources_from_cluster_config()
    if may_have is None and may_grow:
        return
    cluster, grows = config.cluster, may_have is not None
    for resource, per_worker in _per_worker(cluster).items():
        need, most = per_worker * cluster.workers.min, max(has.get(resource, 0), (may_have or {}).get(resource, 0))
        if need > most:
            raise UserError(
                f"cluster.workers {cluster.workers.min} need {need} {resource}s ({per_worker} each), "
                f"but the cluster has {most:g}"
            )
    if not grows and (room := workers_that_fit(cluster)) < cluster.workers.min:
        raise UserError(
            f"cluster.workers {cluster.workers.min} with cluster.cpus_per_worker {cluster.cpus_per_worker} do not fit: "
            f"the nodes, each for itself, have room for {room}"
        )


def workers_that_fit(cluster: ClusterConfig) -> int:
    """How many workers the nodes that are up have room for, each of which lies on one of them."""
    needs = _per_worker(cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) // need) for kind, need in needs.items()) for node in nodes)


def _per_worker(cluster: ClusterConfig) -> dict[str, int]:
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
