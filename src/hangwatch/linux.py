"""System calls that Python's os module does not have.

A worker with the core in C does without ctypes, and never imports this module.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

# Source: linux/membarrier.h, linux/prctl.h, asm/unistd.h, asm-generic/mman.h.
_MEMBARRIER_NUMBERS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "loongarch64": 283,
    "ppc64le": 365,
    "s390x": 356,
}
_TGKILL_NUMBERS = {
    "x86_64": 234,
    "aarch64": 131,
    "riscv64": 131,
    "loongarch64": 131,
    "ppc64le": 250,
    "s390x": 241,
}
_MEMBARRIER_GLOBAL_EXPEDITED = 1 << 1
_MEMBARRIER_REGISTER_GLOBAL_EXPEDITED = 1 << 2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROT_READ_WRITE = 3
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x02, 0x10, 0x20


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


def _system_call(numbers: dict[str, int], *arguments: int) -> int:
    machine = os.uname().machine
    number = numbers.get(machine)
    if number is None or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"system call number unknown on {machine}")
    wide = [ctypes.c_long(argument) for argument in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def register_fence() -> bool:
    """Let `fence` of another process reach this one.

    Returns:
        False where the kernel or a sandbox does not allow it.

    Source: membarrier(2), MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, Linux 4.16.
    """
    try:
        _system_call(_MEMBARRIER_NUMBERS, _MEMBARRIER_REGISTER_GLOBAL_EXPEDITED, 0, 0)
    except OSError:
        return False
    return True


def fence() -> bool:
    """Run a full memory barrier on every CPU that runs a registered process.

    Returns:
        False where the kernel or a sandbox does not allow it.

    Source: membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED, Linux 4.16.
    """
    try:
        _system_call(_MEMBARRIER_NUMBERS, _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0)
    except OSError:
        return False
    return True


def address_of(memory: memoryview) -> int:
    """Return where writable `memory` begins in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def make_private(address: int, size: int) -> None:
    """Replace the mapping at `address` by private zeroes, under every handle to it.

    Source: mmap(2), MAP_FIXED: the old mapping goes and the new one comes in one step.

    Raises:
        OSError: the kernel has no memory left.
    """
    flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS
    if _libc.mmap(address, size, _PROT_READ_WRITE, flags, -1, 0) != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its `parent`, who forked it, ends.

    Source: prctl(2), PR_SET_PDEATHSIG. It is the forking thread's end that counts.
    """
    import signal

    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, not of init.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER, Linux 3.4.

    Raises:
        OSError: the kernel refuses.
    """
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def signal_thread(pid: int, native_id: int, signal: int) -> None:
    """Send `signal` to one thread of process `pid`.

    Uses a thread's pidfd where the kernel has them (Linux 6.9), else tgkill(2),
    which fails if the thread isn't that process's.

    Raises:
        ProcessLookupError: there is no such thread in that process.
        OSError: the kernel refuses.
    """
    import signal as signals

    try:
        # PIDFD_THREAD has the value of O_EXCL; pidfd_open(2).
        thread = os.pidfd_open(native_id, os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    else:
        try:
            if not os.path.isdir(f"/proc/{pid}/task/{native_id}"):
                raise ProcessLookupError(errno.ESRCH, "not a thread of that process")
            signals.pidfd_send_signal(thread, signal)
        finally:
            os.close(thread)
        return
    tgkill(pid, native_id, signal)


def tgkill(pid: int, native_id: int, signal: int) -> None:
    """Signal one thread by number, for kernels before 6.9.

    Source: tgkill(2).

    Raises:
        ProcessLookupError: there is no such thread in that process.
        OSError: the kernel refuses.
    """
    _system_call(_TGKILL_NUMBERS, pid, native_id, signal)


def name_process(name: str) -> None:
    """Set what ps and top show as this process's comm, 15 bytes at most.

    Source: proc(5), /proc/pid/comm.
    """
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(name)
    except OSError:  # a name is a kindness, not a need
        pass
