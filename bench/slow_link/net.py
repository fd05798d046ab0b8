"""Hosts on one switch, each in a network namespace of its own behind a link of a given rate.

Host i is 10.77.0.(i+1) on the device ``eth0`` of namespace ``cograd-i``. Its link is a veth pair to a bridge in
the namespace ``cograd-switch``; a token bucket at both ends shapes both directions. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType

SWITCH = "cograd-switch"
MTU = 1500


class NotPermitted(RuntimeError):
    """This machine or this user cannot make network namespaces."""


class Network:
    """``hosts`` hosts whose links carry ``rate`` Mbit/s in each direction; None leaves them unshaped.

    A context manager: the namespaces are there inside the ``with`` block. Raises NotPermitted without root or
    without ``ip`` and ``tc``.
    """

    def __init__(self, hosts: int, rate: float | None) -> None:
        if hosts < 1:
            raise ValueError(f"hosts must be >= 1; got {hosts}")
        if rate is not None and not rate > 0:
            raise ValueError(f"rate must be > 0 Mbit/s or None; got {rate}")
        self.hosts, self.rate = hosts, rate

    def __enter__(self) -> Network:
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise NotPermitted(f"the slow-link lab needs {' and '.join(missing)} (package iproute2)")
        if os.geteuid() != 0:
            raise NotPermitted("the slow-link lab makes network namespaces, which needs root")
        self._remove()
        _run("ip", "netns", "add", SWITCH)
        _run(*within(SWITCH), "ip", "link", "add", "bridge", "type", "bridge")
        _run(*within(SWITCH), "ip", "link", "set", "bridge", "up")
        for host in range(self.hosts):
            self._plug(host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _plug(self, host: int) -> None:
        space, port = namespace(host), f"port{host}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", port, "netns", SWITCH, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run(*within(SWITCH), "ip", "link", "set", port, "master", "bridge", "up")
        _run(*within(space), "ip", "link", "set", "lo", "up")
        _run(*within(space), "ip", "address", "add", f"{address(host)}/24", "dev", "eth0")
        _run(*within(space), "ip", "link", "set", "eth0", "up")
        if self.rate is not None:
            for where, device in ((SWITCH, port), (space, "eth0")):
                _run(*within(where), "tc", "qdisc", "add", "dev", device, "root", "tbf", *self._bucket())

    def _bucket(self) -> list[str]:
        """A bucket of 4 ms of the rate (the kernel's tick), and room for what TCP sends ahead."""
        assert self.rate is not None
        burst = max(int(self.rate * 1e6 / 8 * 0.004), 4 * MTU)
        return ["rate", f"{self.rate}mbit", "burst", str(burst), "limit", "4000000"]

    def _remove(self) -> None:
        for space in [SWITCH, *map(namespace, range(self.hosts))]:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def namespace(host: int) -> str:
    return f"cograd-{host}"


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def within(space: str) -> list[str]:
    """The beginning of a command that runs inside a namespace."""
    return ["ip", "netns", "exec", space]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}")
