"""Workers that are forked from a warm process, in a tenth of the time of an interpreter's start.

`python -m support.nursery FD MODULE...` imports the modules and then forks a worker for each
request that comes over a socket. A worker runs a script as its `__main__`, with the descriptors,
environment and arguments of the request, and ends as any program does. Requests and answers are
datagrams, so that several processes could share a nursery without mixing them up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import IO, Any

LIMIT = 120.0
"""Seconds that only a dead machine takes: what a test waits for comes long before."""

_TESTS = str(Path(__file__).parents[1])
_STATUS = struct.Struct("i")
_MOST_BYTES = 1 << 17
_STANDARD = 3


class Worker:
    """A process that a nursery forked; the useful half of `subprocess.Popen`'s face.

    Attributes:
        pid: its process id; the number is not given to another before `wait` or `poll` has
            seen its end, or `close` was called.
        stdin, stdout, stderr: our ends of its pipes, as text.
        returncode: its exit status, negative by a signal; None while it runs.
    """

    def __init__(self, pid: int, ended: socket.socket, pipes: list[IO[str] | None]) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | Any = None  # as subprocess has it
        self._ended = ended

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        """Wait for its end; return its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
            (self.returncode,) = _STATUS.unpack(self._ended.recv(_STATUS.size))
            with contextlib.suppress(OSError):  # the nursery has ended
                self._ended.shutdown(socket.SHUT_WR)
                self._ended.recv(1)  # until it has waited for it
        return int(self.returncode)

    def communicate(self, text: str | None = None, timeout: float = LIMIT) -> tuple[str, str]:
        """Write to it, and read all that it prints; return that, once it has ended."""
        until = monotonic() + timeout
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(text or "")
        read = {"stdout": "", "stderr": ""}

        def drain(name: str, stream: IO[str]) -> None:
            read[name] = stream.read()

        streams = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=drain, args=(name, stream), daemon=True)
            for name, stream in streams.items()
            if stream is not None
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(0.0, until - monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
        self.wait(max(0.0, until - monotonic()))
        for stream in filter(None, streams.values()):
            stream.close()
        return read["stdout"], read["stderr"]

    def read_line(self) -> str:
        """Wait for a line that it prints; return it without its end."""
        assert self.stdout is not None
        return self.stdout.readline().rstrip("\n")

    def write_line(self, line: str = "") -> None:
        """Write a line to it, which it may wait for."""
        assert self.stdin is not None
        print(line, file=self.stdin, flush=True)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless its end is known."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for its end, and close our ends of its pipes."""
        self.wait()
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close our ends of its pipes."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was written and nobody reads
                    stream.close()
        with contextlib.suppress(OSError):  # it is closed, or the nursery has ended
            self._ended.shutdown(socket.SHUT_RDWR)  # whoever else was forked and has it
        self._ended.close()


class Nursery:
    """A warm process that forks workers.

    Args:
        modules: what is imported before the first fork.
    """

    def __init__(self, *modules: str) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A sitecustomize that our own environment asks for comes before the machine's.
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), _TESTS, *sys.path]
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.nursery", str(its.fileno()), *modules],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**_clean(os.environ), "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._socket = ours
        self._lock = threading.Lock()

    def fork(
        self,
        script: str,
        *arguments: str,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        file: str = "-c",
    ) -> Worker:
        """Fork a worker that runs a script.

        Args:
            script: its source.
            arguments: `sys.argv[1:]`.
            stdin, stdout, stderr: as of `subprocess.Popen`; inherited where None.
            env: its environment; ours where None.
            cwd: its working directory; ours where None.
            file: what its command line says that it runs.
        """
        theirs, ours = _standard_streams(stdin, stdout, stderr)
        ended, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "script": script,
            "file": file,
            "arguments": list(arguments),
            "env": dict(os.environ if env is None else env),
            "cwd": os.path.abspath(cwd or "."),
            "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        }
        try:
            with self._lock:
                socket.send_fds(
                    self._socket, [json.dumps(request).encode()], [its_end.fileno(), *theirs]
                )
                pid = int(self._socket.recv(64))
        finally:
            its_end.close()
            for descriptor in theirs:
                os.close(descriptor)
        return Worker(pid, ended, ours)

    def close(self) -> None:
        """End it, and all that it forked and is still there."""
        self._socket.close()
        self._process.wait()


@functools.cache
def nursery() -> Nursery:
    """Return this process's nursery of workers; it ends with this process."""
    return Nursery(
        "hangwatch", "hangwatch.timer", "hangwatch.wire", "json", "logging", "asyncio", "contextlib"
    )


def _standard_streams(
    *wanted: int | IO[Any] | None,
) -> tuple[list[int], list[IO[str] | None]]:
    """Return a worker's descriptors 0 to 2, and our ends of what are pipes."""
    theirs: list[int] = []
    ours: list[IO[str] | None] = []
    for number, stream in enumerate(wanted):
        end = None
        if stream == subprocess.PIPE:
            reading, writing = os.pipe()
            mine, its = (writing, reading) if number == 0 else (reading, writing)
            end = open(mine, "w" if number == 0 else "r")  # noqa: SIM115  # closed by the Worker
        elif stream == subprocess.DEVNULL:
            its = os.open(os.devnull, os.O_RDWR)
        elif stream == subprocess.STDOUT:
            its = os.dup(theirs[1])
        elif stream is None:
            its = os.dup(number)
        else:
            its = os.dup(stream if isinstance(stream, int) else stream.fileno())
        theirs.append(its)
        ours.append(end)
    return theirs, ours


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith("HANGWATCH_")}


# -- the nursery's own process


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for whoever asks. Returns in a worker, with its request and its descriptors."""
    children: dict[int, tuple[int, socket.socket]] = {}
    dead: dict[int, tuple[int, socket.socket]] = {}  # nobody has taken note of their end yet
    while True:
        ready, _, _ = select.select([requests.fileno(), *children, *dead], [], [])
        for number in set(ready) & dead.keys():
            pid, ended = dead.pop(number)
            os.waitpid(pid, 0)
            # Seen although a child that was just forked, and may be stopped, has it, too.
            with ended, contextlib.suppress(OSError):  # nobody may be left to see it
                ended.shutdown(socket.SHUT_RDWR)
        for pidfd in set(ready) & children.keys():
            pid, ended = children.pop(pidfd)
            os.close(pidfd)
            dead[ended.fileno()] = pid, ended
            with contextlib.suppress(OSError):  # nobody may want to know it
                ended.send(_STATUS.pack(_exit_status(pid)))
        if requests.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(requests, _MOST_BYTES, 1 + _STANDARD)
        if not message:
            for pid, _ in children.values():
                os.kill(pid, signal.SIGKILL)  # our child, not waited for: nobody else's number
            sys.exit()
        pid = os.fork()
        if pid == 0:
            for pidfd in children:
                os.close(pidfd)
            for _, ended in (*children.values(), *dead.values()):
                ended.close()
            requests.close()
            os.close(descriptors[0])
            return json.loads(message), descriptors[1:]
        children[os.pidfd_open(pid)] = pid, socket.socket(fileno=descriptors[0])
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        requests.send(b"%d" % pid)


def _exit_status(pid: int) -> int:
    """Return the exit status of a child that has ended, without waiting for it."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def _become(request: dict[str, Any], descriptors: list[int]) -> types.CodeType:
    """Take on what a request says; return the code to run."""
    # Above 2 all of them, since the nursery has those: none is overwritten before its turn.
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if "hangwatch.worker.warnings" in sys.modules:  # as in a program that was started with these
        importlib.reload(sys.modules["hangwatch.worker.warnings"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    sys.argv[:] = [request["file"], *request["arguments"]]
    first = ["-c", request["script"]] if request["file"] == "-c" else [request["file"]]
    sys.orig_argv[:] = [sys.executable, *first, *request["arguments"]]
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    name = "<string>" if request["file"] == "-c" else request["file"]
    return compile(request["script"], name, "exec")


def _program(code: types.CodeType) -> dict[str, Any]:
    """Make a fresh `__main__`; return its names."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if code.co_filename != "<string>":
        main.__file__ = code.co_filename
    return main.__dict__


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Print an exception without our own frame at its outer end."""
    traceback.print_exception(kind, error, trace.tb_next if trace else None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _name in sys.argv[2:]:
        importlib.import_module(_name)
    io.text_encoding(None)
    sys.excepthook = _excepthook
    _code = _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
    exec(_code, _program(_code))
