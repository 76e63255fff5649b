"""Several processes that train one model, each with its own devices and its own part of the data.

`jax.distributed` joins the devices. Beside it each process keeps one plain TCP connection to process 0, the leader:
over it small values are gathered, and the kernel closes it the moment a process dies (keepalive: half a minute where a
whole host is lost). Then all others end with one line that names it. JAX alone would wait in a collective without end,
and its own verdict, after 100 seconds, is an abort with a C++ stack.

Everything here returns at once in a run of one process, and does not touch JAX's devices before `initialize`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

from nanochat_jax.errors import UserError

T = TypeVar("T")
PATIENCE = 300  # seconds for all processes to come
LOST_HOST = 30  # seconds without a sign of life from the kernel of the other host
VERDICT = 5  # seconds in which a death becomes known, after a collective failed
HEARTBEAT = 100  # seconds; JAX's own, slower than the watch here on purpose
VARIABLES = {
    "--coordinator": "COORDINATOR_ADDRESS",
    "--num-processes": "NUM_PROCESSES",
    "--process-id": "PROCESS_ID",
}


@dataclass(frozen=True)
class Membership:
    """Which process this one is, of how many, and where process 0 listens."""

    host: str
    port: int
    count: int
    index: int


def membership(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> Membership | None:
    """What the options say, else the environment, else SLURM's step; None for a run of one process.

    UserError where one of the three is missing or makes no sense.
    """
    options = dict(zip(VARIABLES, (coordinator, num_processes, process_id), strict=True))
    given = {name: environ.get(VARIABLES[name]) if value is None else value for name, value in options.items()}
    if all(value is None for value in given.values()):
        given = _slurm_step(environ)
    if not given:
        return None
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(
            f"several processes need {', '.join(VARIABLES)} (or {', '.join(VARIABLES.values())}); "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given"
        )
    host, _, port = str(given["--coordinator"]).rpartition(":")
    try:
        found = Membership(
            host.strip("[]"), int(port), int(given["--num-processes"] or 0), int(given["--process-id"] or 0)
        )
    except ValueError:
        found = None
    if found is None or not found.host or not 0 < found.port < 2**16:
        shown = ", ".join(f"{name} {value}" for name, value in given.items())
        raise UserError(f"{shown}: HOST:PORT of process 0 and two whole numbers are needed")
    if not 0 <= found.index < found.count:
        raise UserError(
            f"--process-id {found.index} of --num-processes {found.count}: ids go from 0 to {found.count - 1}"
        )
    return found if found.count > 1 else None


def _slurm_step(environ: Mapping[str, str]) -> dict[str, str | int | None]:
    """The same three from the variables that `srun` sets; empty outside of a step."""
    names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID")
    if not all(name in environ for name in names):
        return {}
    nodes, count, index, job = (environ[name] for name in names)
    # "a1", "a1,b7", "a[1-3,9],b7": the first one.
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    host = "".join(part or "" for part in first.groups()) if first else nodes
    # One port a job, below the range that the kernel hands out by itself.
    return {
        "--coordinator": f"{host}:{20_000 + int(job) % 10_000}",
        "--num-processes": count,
        "--process-id": index,
    }


def initialize(member: Membership, workdir: Path, patience: float = PATIENCE) -> str:
    """Joins the processes; to be called once, before anything asks JAX for devices. Returns who they are, in words.

    UserError where process 0 cannot be reached or another process does not come within `patience` seconds.
    """
    global _link
    import jax

    if member.index == 0:
        sockets, names, port = _welcome(member, patience)
        address = f"127.0.0.1:{port}"
    else:
        sockets, names, port = _report(member, patience)
        # JAX's client aborts the process, with a C++ stack, when the connection to its service breaks. Behind a
        # relay the connection stays and the watch has the time to say what happened.
        address = f"127.0.0.1:{_relay(member.host, port)}"
    _link = Link(member.index, names, sockets, Path(workdir))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from Python's handlers
    if any(name in os.environ for name in ("grpc_proxy", "https_proxy", "http_proxy")):
        # gRPC would ask the proxy even for this machine; the name is gRPC's own.
        os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112
    jax.distributed.initialize(
        address,
        member.count,
        member.index,
        # Otherwise a SLURM step gets one device a process; to share a host set CUDA_VISIBLE_DEVICES.
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
        coordinator_bind_address=f"{'127.0.0.1' if _is_loopback(member.host) else '[::]'}:{port}",
    )
    jax.devices()  # the processes tell each other their devices: all at this time, not one after minutes of other work
    return f"{member.count} processes: {', '.join(names)}"


def is_leader() -> bool:
    """Whether this process is the one that writes and speaks: process 0."""
    return _link is None or _link.index == 0


def is_shared() -> bool:
    """Whether several processes work on this run."""
    return _link is not None


def speaker() -> str:
    """What an error message of this process begins with: which of several it is."""
    return "" if _link is None else f"process {_link.index}: "


def barrier(name: str) -> None:
    """Returns when every process has called it with this name."""
    gather_json(None, name)


def gather_json(value: Any, name: str = "") -> list[Any]:
    """Every process's JSON-able `value`, in process order, the same list on all.

    Threads that gather at the same time need a `name` each: calls of one name are matched in their order.
    """
    return [value] if _link is None else _link.gather(value, name)


def leaders(value: T) -> T:
    """The leader's `value`, JSON-able, in all processes: what they decide by must not depend on what each one's view of
    the shared file system shows at the moment.
    """
    return gather_json(value)[0]


def leader_first(name: str, action: Callable[[], T]) -> T:
    """`action()` in the leader, then in the others, which find its work done on the file system that all share."""
    if not is_leader():
        barrier(name)
    result = action()
    if is_leader():
        barrier(name)
    return result


def should_stop(step: int, asked: bool) -> bool:
    """Whether all processes stop after this step, because one of them was asked to. All call it after every step."""
    told = gather_json([step, bool(asked)], "stop")
    if any(other != step for other, _ in told):
        raise UserError(f"the processes are at different steps ({told}): start all of them again")
    return any(stop for _, stop in told)


def finish() -> None:
    """The end of a run that went well: waits for the others, says goodbye."""
    global _link
    if _link is None:
        return
    import jax

    _link.leave()
    jax.distributed.shutdown()
    _link = None


def fail(error: str, status: int) -> None:
    """The end of a run that did not: tells the others why and leaves without waiting for them. Does not return where
    several processes work.
    """
    if _link is not None:
        _link.fail(error)
        _exit(status)


class Link:
    """The connections of this process: to all others in process 0, to process 0 in the others."""

    def __init__(self, index: int, names: list[str], sockets: dict[int, socket.socket], workdir: Path) -> None:
        self.index, self.names = index, names
        self._sockets, self._workdir = dict(sorted(sockets.items())), workdir
        self._boxes: dict[tuple[str, int], SimpleQueue[Any]] = {}
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        for other, connection in sockets.items():
            _keep_alive(connection)
            threading.Thread(target=self._listen, args=(other, connection), daemon=True).start()

    def gather(self, value: Any, name: str) -> list[Any]:
        """See `gather_json`."""
        if self.index:
            self._send("values", name, value)
            return self._box(name, 0).get()
        values = [json.loads(json.dumps(value)), *(self._box(name, other).get() for other in self._sockets)]
        self._send("values", name, values)
        return values

    def leave(self) -> None:
        """Waits until all are here; what closes from now on is no death."""
        self.gather(None, "leave")
        self._ending.acquire(blocking=False)
        self._send("bye", "", None)

    def fail(self, error: str) -> None:
        """Tells the others what ended this process."""
        if self._ending.acquire(blocking=False):
            self._send("end", "", f"{self.names[self.index]} stopped: {error}")

    def _listen(self, other: int, connection: socket.socket) -> None:
        try:
            for line in connection.makefile("rb"):
                kind, name, value = json.loads(line)
                if kind == "bye":
                    return
                if kind == "end":
                    self._end(value)
                    return
                self._box(name, other).put(value)
        except (OSError, ValueError):
            pass  # a line torn by a death, or a connection given up: the same as its end
        self._end(f"{self.names[other]} is gone")

    def _box(self, name: str, other: int) -> SimpleQueue[Any]:
        """The values of a name that have come from another process and were not taken yet."""
        return self._boxes.setdefault((name, other), SimpleQueue())

    def _send(self, kind: str, name: str, value: Any) -> None:
        line = json.dumps([kind, name, value]).encode() + b"\n"
        for connection in self._sockets.values():
            # Whoever cannot be reached is dead, which its listener says.
            with self._sending, contextlib.suppress(OSError):
                connection.sendall(line)

    def _end(self, reason: str) -> None:
        """Ends this process, unless it is ending by itself; the leader tells the others first."""
        if not self._ending.acquire(blocking=False):
            return
        try:
            if self.index == 0:
                self._send("end", "", reason)
            print(f"error: {reason}; {self._newest()}: start all processes again to go on", file=sys.stderr, flush=True)
        finally:
            _exit(1)

    def _newest(self) -> str:
        """The newest checkpoint of the run, in words."""
        saved: list[tuple[float, Path]] = []
        for path in self._workdir.glob("*/checkpoints/step_" + 8 * "[0-9]"):
            with contextlib.suppress(OSError):  # pruned meanwhile
                saved.append((path.stat().st_mtime, path))
        if not saved:
            return "there is no checkpoint yet"
        path = max(saved)[1]
        return f"newest checkpoint of {path.parents[1].name}: step {int(path.name.removeprefix('step_'))}"


# The process itself is what belongs to a run of several processes, as in jax.distributed.
_link: Link | None = None


def _exit(status: int) -> NoReturn:
    """Leaves at once: threads may be inside a collective that never ends, and exit handlers would wait for them."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _welcome(member: Membership, patience: float) -> tuple[dict[int, socket.socket], list[str], int]:
    """Process 0: (connections by process, names by process, a free port for JAX's service)."""
    names = {0: _name(0, socket.gethostname(), os.getpid())}
    sockets: dict[int, socket.socket] = {}
    deadline = time.monotonic() + patience
    refusal = ""
    try:
        server = _listening(member.host, member.port)
    except OSError as error:
        raise UserError(
            f"--coordinator {member.host}:{member.port}: process 0 cannot listen there ({error.strerror}); name "
            "another port"
        ) from None
    with server, _listening(member.host, 0) as reserved:
        while len(names) < member.count and not refusal:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                late = ", ".join(str(i) for i in range(member.count) if i not in names)
                refusal = f"of {member.count} processes these did not come in {patience:g} s: {late}; start them"
                break
            try:
                connection.settimeout(10)
                index, count, host, pid = json.loads(_read_line(connection))
                name = _name(index, host, pid)
            except (OSError, ValueError, TypeError):
                connection.close()  # not one of us
                continue
            if count != member.count or index in names:
                why = f"is there already ({names[index]})" if index in names else f"says {count}"
                refusal = f"--num-processes {member.count} here, but process {index} {why}: give each its own id"
            names[index], sockets[index] = name, connection
        port = reserved.getsockname()[1]
    answer = json.dumps([refusal, [names.get(i) for i in range(member.count)], port]).encode() + b"\n"
    for connection in sockets.values():
        with contextlib.suppress(OSError):
            connection.sendall(answer)
    if refusal:
        raise UserError(refusal)
    return sockets, [names[i] for i in range(member.count)], port


def _report(member: Membership, patience: float) -> tuple[dict[int, socket.socket], list[str], int]:
    """Every other process: the same, from process 0."""
    address = f"{member.host}:{member.port}"
    try:
        connection = _connected(member.host, member.port, patience)
    except OSError as error:
        raise UserError(
            f"process 0 does not answer at --coordinator {address} in {patience:g} s ({error}): start it, or "
            "correct the address"
        ) from None
    connection.settimeout(patience + 30)  # process 0 waits for the others
    try:
        hello = [member.index, member.count, socket.gethostname(), os.getpid()]
        connection.sendall(json.dumps(hello).encode() + b"\n")
        refusal, names, port = json.loads(_read_line(connection))
    except (OSError, ValueError):
        raise UserError(f"process 0 at --coordinator {address} broke off: see what it says") from None
    if refusal:
        raise UserError(f"process 0 at {address} says: {refusal}")
    return {0: connection}, names, port


def _read_line(connection: socket.socket) -> bytes:
    """A line and not a byte more: what follows belongs to the listener of `Link`."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


def _name(index: int, host: str, pid: int) -> str:
    return f"process {index} (host {host}, pid {pid})"


def _listening(host: str, port: int) -> socket.socket:
    """A server on all addresses of this machine, or only on its own where the others are said to be there."""
    if _is_loopback(host):
        return socket.create_server(("127.0.0.1", port))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _keep_alive(connection: socket.socket) -> None:
    """The kernel asks a silent peer for a sign of life and breaks the connection after LOST_HOST seconds without."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"KEEPIDLE": LOST_HOST // 3, "KEEPINTVL": LOST_HOST // 6, "KEEPCNT": 4, "USER_TIMEOUT": LOST_HOST * 1000}
    for name, value in options.items():
        if hasattr(socket, f"TCP_{name}"):  # Linux; elsewhere the system's own times hold
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def _relay(host: str, port: int) -> int:
    """A port of this machine whose connections go on to host:port, and stay open when those break."""
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, last: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        if last:
            target.close()

    def accept() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = _connected(host, port, LOST_HOST)  # process 0 may not have started JAX's service yet
            except OSError:
                near.close()
                continue
            threading.Thread(target=pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=pump, args=(far, near, False), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def _connected(host: str, port: int, patience: float) -> socket.socket:
    """A connection to process 0, asked for until it listens. OSError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
