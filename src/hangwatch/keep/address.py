"""Where a watcher listens."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
from collections.abc import Collection

from hangwatch.errors import AddressError
from hangwatch.failpoints import failpoint
from hangwatch.folder import known_folder
from hangwatch.page.layout import VERSION

SHARED = "/run/hangwatch-shared"
"""Where root listens for other users: their way into its own folders is barred."""

NAMES_BEGIN = f"v{VERSION}-"
"""How a socket's name begins: a watcher of another version is none to connect to, or to replace."""

LONGEST = 107  # unix(7): sun_path is 108 bytes, the last one NUL


def default_directory() -> str:
    """Return this user's folder for sockets; it may not exist yet."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    try:
        # After su, or on another node, it may name what is not there or not ours.
        usable = bool(runtime) and os.stat(runtime).st_uid == os.geteuid()
    except OSError:
        usable = False
    return f"{runtime}/hangwatch" if usable else known_folder()


def default_address(shared: bool = False) -> str:
    """Return where `hangwatch serve` listens if nothing else is said; see `listen`."""
    return f"{SHARED if shared else default_directory()}/{NAMES_BEGIN}watcher.sock"


def private_address(shared: bool = False) -> str:
    """Return an address that no other watcher has; see `listen`."""
    name = f"{NAMES_BEGIN}{os.getpid()}-{secrets.token_hex(4)}.sock"
    if shared:
        return f"{SHARED}/{name}"
    path = f"{default_directory()}/{name}"
    return path if len(os.fsencode(path)) <= LONGEST else f"{known_folder()}/{name}"


def listen(path: str, others: Collection[int] = ()) -> socket.socket:
    """Listen at `path`, which this user alone may connect to.

    The folder is made with mode 0700 if it is missing; the socket has mode 0600. What a
    dead watcher left at `path` is replaced.

    Args:
        path: where.
        others: the users that may connect as well. The folder has mode 0711 then, and the
            socket an access control list; on a file system that has none, mode 0666, and it
            is the watcher who turns strangers away.

    Raises:
        AddressError: the path is too long, its folder is somebody else's or open to
            others, or closed to them although it is shared, something that is no socket
            is there, or another watcher listens.
    """
    path, shared = os.path.abspath(path), bool(others)
    if len(os.fsencode(path)) > LONGEST:
        raise AddressError(
            f"{path} has more than {LONGEST} bytes, too long for a socket: "
            "give a shorter --address, or set XDG_RUNTIME_DIR to a shorter folder"
        )
    try:
        check_folder(os.path.dirname(path), shared)
        _remove_dead(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            umask = os.umask(0o177)
            try:
                listener.bind(path)
            finally:
                os.umask(umask)
            if others:
                _let_in(path, others)
            listener.listen(4096)
        except BaseException:
            listener.close()
            raise
    except AddressError:
        raise
    except OSError as error:
        raise AddressError(
            f"can't listen at {path} ({error.strerror}): give another --address"
        ) from None
    return listener


def _let_in(path: str, others: Collection[int]) -> None:
    try:
        failpoint("kernel.acl")
        os.setxattr(path, "system.posix_acl_access", _access_of(others))
    except OSError:  # no access control lists there
        os.chmod(path, 0o666)


def _access_of(others: Collection[int]) -> bytes:
    """Return an access control list by which the owner and these users may read and write.

    Source: acl(5); linux/posix_acl_xattr.h: a version, then tag, permissions and id of each.
    """
    user_obj, user, group_obj, mask, other = 0x01, 0x02, 0x04, 0x10, 0x20
    nobody, read_write, nothing = 0xFFFFFFFF, 6, 0
    entries = [
        (user_obj, read_write, nobody),
        *((user, read_write, uid) for uid in sorted(others)),
        (group_obj, nothing, nobody),
        (mask, read_write, nobody),
        (other, nothing, nobody),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def check_folder(folder: str, shared: bool = False) -> None:
    """Make the folder if it is missing, and see that nobody else can put anything there.

    Args:
        folder: its path.
        shared: whether others must be able to pass through; they still can't list it.

    Raises:
        AddressError: it is somebody else's, open to others, closed to them although it is
            shared, or no folder.
        OSError: it can't be made.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(folder, mode=0o700)
        if shared:
            os.chmod(folder, 0o711)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise AddressError(f"{folder} is no folder: give another --address")
    if status.st_uid != os.geteuid():
        raise AddressError(
            f"{folder} belongs to user {status.st_uid}, who could put a false watcher there: "
            "give an --address in a folder of your own"
        )
    if status.st_mode & (0o066 if shared else 0o077):
        raise AddressError(
            f"{folder} is open to other users (mode {stat.S_IMODE(status.st_mode):o}): "
            f"chmod {711 if shared else 700} it, or give an --address in a folder "
            f"that {'they can only pass through' if shared else 'is closed to them'}"
        )
    while shared:
        # With an ACL the group's bit says whether it lets anybody through; acl(5).
        if not os.stat(folder).st_mode & 0o011:
            raise AddressError(
                f"{folder} is closed to the users that --allow-uid names: "
                "chmod 711 it, or give an --address that they can reach"
            )
        if folder == "/":
            return
        folder = os.path.dirname(folder)


def _remove_dead(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise AddressError(f"{path} exists and is no socket: give another --address")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass
    raise AddressError(f"another watcher listens at {path}: use it, or give another --address")
