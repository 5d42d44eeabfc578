"""The other processes of a run that several train together: how a process joins them, and how all end with one.

Every process starts with the same command. Once joined, each of them holds a connection to the first one. The kernel
closes it when a process dies, whatever the reason, and probes ask after machines that no longer answer. Then every
process that is left says so in one sentence and exits with code 3, and the same command goes on from the last
checkpoint. Devices cannot be left to find out: a sum over them may wait for the dead process for ever.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from accounting.errors import InputError, as_flags
from dpgemma.choices import AUTO
from dpgemma.sharding import processes

PEER_DIED = 3

# How long a process waits for the others at the start, and for them to read why all end.
SECONDS_TO_JOIN, _SECONDS_TO_LEAVE = 300, 3
# How long jax's own coordinator waits for a sign of life: much longer than these connections, which know the reason.
_SECONDS_OF_COORDINATOR = 100
# Probes of an idle connection: seconds until the first, seconds between them, probes without an answer until it ends;
# milliseconds that what was sent may be without an answer.
_PROBES = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 8000}
_LONGEST_MESSAGE = 10**4
_DONE: dict[str, Any] = {"done": True}
_GOES_ON = "start all processes again with the same command, and the run goes on from its last checkpoint"


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[int]:
    """Joins the processes of a run, leaves them when all are done, and yields their number; 1 for this one alone.

    An exception in one process ends all of them: the others say what it was.

    Args:
      coordinator: HOST:PORT, which process 0 opens, or "auto" where jax recognises the cluster; None for one process.
      num_processes, process_id: how many there are, and the number of this one, from 0; not with "auto".

    Raises:
      InputError: impossible arguments, or processes that do not come.
    """
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise InputError("`num_processes` and `process_id` need `coordinator`=HOST:PORT, which process 0 opens")
    if coordinator is None:
        yield 1
        return
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise InputError("`coordinator`=auto finds `num_processes` and `process_id` by itself: drop them")
        links = _recognised()
    else:
        links = _at(*_checked(coordinator, num_processes, process_id))
    try:
        links.start_jax()
        yield links.count
        links.end()
    except BaseException as error:
        links.fail(error)
        raise


def leave(code: int) -> None:
    """Ends a process that would otherwise wait for what does not come; does nothing where there is nothing of the kind.

    Others of a run are gone or ending too. Where a checkpoint could not be written, threads of Orbax wait for files of
    it, for minutes.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    if not processes.are_joined():
        if not code or all(thread.daemon for thread in others):
            return
        atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _recognised() -> "_Links":
    """Processes of a cluster that jax recognises."""
    try:
        _initialise()
    except ValueError:
        raise InputError(
            "`coordinator`=auto knows Cloud TPU, Slurm, Open MPI and Kubernetes, and this is none of them: give"
            " `coordinator`=HOST:PORT, `num_processes` and `process_id`"
        ) from None
    count, number = processes.count(), processes.number()
    if count == 1:
        return _Links({}, 0, 1)
    host = processes.coordinator().rpartition(":")[0]
    server = _server(0, count) if number == 0 else None
    port = processes.from_first(lambda: server.getsockname()[1] if server else 0)
    if server is not None:
        return _Links(_accepted(server, count), number, count)
    return _Links({0: _called(host, port, count, number)}, number, count)


def _checked(coordinator: str, num_processes: int | None, process_id: int | None) -> tuple[str, int, int, int]:
    """(host, port, number of processes, number of this one).

    Raises:
      InputError: impossible arguments.
    """
    host, _, given_port = coordinator.rpartition(":")
    if not host or not (given_port.isascii() and given_port.isdecimal() and 0 < int(given_port) < 2**16):
        raise InputError(f"`coordinator` must be auto or HOST:PORT, got {coordinator!r}")
    if num_processes is None or process_id is None:
        raise InputError("`coordinator`=HOST:PORT needs `num_processes` and `process_id`")
    if not 0 <= process_id < num_processes:
        raise InputError(f"`process_id` must be at least 0 and below `num_processes`={num_processes}, got {process_id}")
    return host, int(given_port), num_processes, process_id


def _at(host: str, port: int, count: int, number: int) -> "_Links":
    """Processes that were told where the first one is. jax's own coordinator begins when all have come, because it
    ends processes that wait in vain with a trace of its own.
    """
    if count == 1:
        return _Links({}, 0, 1)
    if number == 0:
        links = _accepted(_server(port, count), count)
        with _server(0, 1) as free:
            of_jax = free.getsockname()[1]
        for link in links.values():
            with contextlib.suppress(OSError):  # whoever has died since is noticed as later
                _send(link, {"port": of_jax})
    else:
        link = _called(host, port, count, number)
        links, told = {0: link}, _receive(link, SECONDS_TO_JOIN + _SECONDS_TO_LEAVE)
        if told is None or "port" not in told:
            ended = (
                f"{host}:{port} does not answer as process 0 of a run: is `coordinator` right, and has it not ended?"
            )
            raise InputError((told or {}).get("sentence", ended))
        of_jax = told["port"]
    options = {"num_processes": count, "process_id": number, "cluster_detection_method": "deactivate"}
    return _Links(links, number, count, {"coordinator_address": f"{host}:{of_jax}", **options})


def _initialise(**options: Any) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, on which a run is saved
    jax.distributed.initialize(
        initialization_timeout=SECONDS_TO_JOIN, heartbeat_timeout_seconds=_SECONDS_OF_COORDINATOR, **options
    )


class _Links:
    """Connections of this process: of the first one to each other process, of another one to the first.

    Messages are lines of JSON: {"code": exit code, "sentence": why all end}, or _DONE from a process that ended well.
    """

    def __init__(
        self, links: dict[int, socket.socket], number: int, count: int, options: dict[str, Any] | None = None
    ) -> None:
        """Takes the connections by the number of the process at the other end.

        Args:
          number: of this process.
          count: of all.
          options: with which jax is to be initialised, where it is not yet.
        """
        self._links, self._number, self.count, self._options = links, number, count, options
        self._ending = threading.Lock()  # taken once, by whoever ends this process
        self._threads = [threading.Thread(target=self._watch, args=link, daemon=True) for link in links.items()]
        for thread in self._threads:
            thread.start()

    def start_jax(self) -> None:
        """Joins the processes for jax, where a cluster has not done so; connections are watched already."""
        if self._options is not None:
            _initialise(**self._options)

    def _watch(self, peer: int, link: socket.socket) -> None:
        message = _receive(link) or {"code": PEER_DIED, "sentence": f"process {peer} has died: {_GOES_ON}"}
        if message == _DONE:
            _receive(link)  # until the other end closes
            return
        if self._ending.acquire(blocking=False):
            self._tell(message)
            _exit(message)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends. Where its devices failed it ends here: they wait for dead ones."""
        import jax

        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the thread that was told ends this process
        this = f"process {self._number}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = str(error).partition("\n")[0][:150]
            message = {"code": PEER_DIED, "sentence": f"a step failed in {this} ({reason}): {_GOES_ON}"}
            self._tell(message)
            _exit(message)
        if isinstance(error, InputError):
            self._tell({"code": 2, "sentence": str(error)})
        else:
            self._tell({"code": PEER_DIED, "sentence": f"{this} ended with {type(error).__name__}: {_GOES_ON}"})

    def _tell(self, message: dict[str, Any]) -> None:
        """Passes a message on. The first process waits until the others are gone: the coordinator dies with it."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                _send(link, message)
        if self._number == 0:
            last = time.monotonic() + _SECONDS_TO_LEAVE
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(max(0.0, last - time.monotonic()))

    def end(self) -> None:
        """Waits until all processes are done. That a connection closes behind this message means nothing."""
        processes.meet("end")
        self._tell(_DONE)


def _server(port: int, count: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
    except OSError as error:
        raise InputError(f"process 0 cannot open port {port} ({error.strerror}): give another `coordinator`") from None


def _accepted(server: socket.socket, count: int) -> dict[int, socket.socket]:
    """The connections of all others, when all have called.

    Raises:
      InputError: some did not, or were started otherwise; those that did are told.
    """
    links: dict[int, socket.socket] = {}
    last = time.monotonic() + SECONDS_TO_JOIN
    try:
        with server:
            while len(links) < count - 1:
                wait = max(0.0, last - time.monotonic())
                ready, _, _ = select.select([server, *links.values()], [], [], wait)
                for dead in [peer for peer, link in links.items() if link in ready]:
                    links.pop(dead).close()  # nobody says anything yet, so this is its end
                if not ready:
                    missing = ", ".join(str(number) for number in range(1, count) if number not in links)
                    raise InputError(
                        f"of {count} processes, number {missing} did not come within {SECONDS_TO_JOIN} seconds: start"
                        " all of them, each with its own `process_id` and all with the same `coordinator`"
                    )
                if server not in ready:
                    continue
                link, _ = server.accept()
                hello = _receive(link, _SECONDS_TO_LEAVE) or {}
                number, of = hello.get("process"), hello.get("of")
                if not isinstance(number, int) or not isinstance(of, int):
                    link.close()  # somebody else
                    continue
                if of != count or number in links or not 0 < number < count:
                    links[-1] = link
                    raise InputError(
                        f"a process says that it is number {number} of {of}, but process 0 expects each number below"
                        f" {count} once: give all the same `num_processes`, and each its own `process_id`"
                    )
                links[number] = _watched(link)
    except InputError as error:
        for link in links.values():
            with contextlib.suppress(OSError):
                _send(link, {"code": 2, "sentence": str(error)})
        raise
    return links


def _called(host: str, port: int, count: int, number: int) -> socket.socket:
    """The connection to the first process, which may start later."""
    last = time.monotonic() + SECONDS_TO_JOIN
    while True:
        try:
            link = socket.create_connection((host.strip("[]"), port), timeout=max(1.0, last - time.monotonic()))
            _send(link, {"process": number, "of": count})
            return _watched(link)
        except (OSError, UnicodeError) as error:  # the second is of a name that no host can have
            if time.monotonic() > last or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                raise InputError(
                    f"process {number} did not reach process 0 at {host}:{port} within {SECONDS_TO_JOIN} seconds"
                    f" ({reason}): start process 0, and give its address as `coordinator`"
                ) from None
            time.sleep(0.5)


def _watched(link: socket.socket) -> socket.socket:
    """The connection, which ends by itself where the other machine no longer answers."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):  # each system has some of them
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket, seconds: float | None = None) -> dict[str, Any] | None:
    """The next message; None where the connection has ended, brings something else, or nothing for so many seconds."""
    line, last = b"", time.monotonic() + (seconds or 0)
    try:
        while not line.endswith(b"\n"):
            link.settimeout(None if seconds is None else max(0.001, last - time.monotonic()))
            part = link.recv(1)  # no more than one line, because another message may stand behind it
            if not part or len(line) > _LONGEST_MESSAGE:
                return None
            line += part
        link.settimeout(None)
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _exit(message: dict[str, Any]) -> None:
    try:
        print(f"\ndpgemma: {as_flags(message['sentence'])}", file=sys.stderr)
        _flush()
    finally:  # whoever read standard error may be gone too
        os._exit(message["code"])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
