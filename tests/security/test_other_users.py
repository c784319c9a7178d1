"""Another user can't connect, read or be reaped, unless `--allow-uid` names it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hangwatch
from hangwatch import failpoints
from hangwatch.errors import AddressError, ProtocolError
from hangwatch.keep.address import listen
from hangwatch.watcher import admission
from hangwatch.watcher.settings import checked_settings
from hangwatch.watcher.users import checked_uid
from security.second_user import (
    ANOTHER,
    THIRD_UID,
    UID,
    needs_rights,
    needs_root,
    run,
    script,
    start,
)
from support.processes import is_alive
from support.raw_worker import answer, hello, memfd
from support.watchers import CONNECT, RunningWatcher, StartWatcher, wait_until

# A worker that its watcher does not answer in time would run on unwatched, and never end.
JOIN = "become()" + CONNECT
HANGS = f"""
def stuck_here(): time.sleep(1000)
{JOIN}
with hangwatch.expires(0.3, "theirs"): stuck_here()
"""

OVERRUNS = "import time\nwith hangwatch.expires(0.05, 'ours'): time.sleep(1000)"


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that others can get through, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="hw-test-") as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as path:
        yield path


@pytest.fixture(scope="module")
def allowing() -> Iterator[RunningWatcher]:
    """Return a watcher of root's that allows the second user, which many tests share."""
    with allowing_watcher() as watcher:
        yield watcher


@contextmanager
def allowing_watcher() -> Iterator[RunningWatcher]:
    with open_folder() as path:
        server = hangwatch.SharedMemoryTimerServer(
            path / "made" / "sock", report_dir=path / "reports", allow_uids=[UID]
        )
        server.start()
        try:
            yield RunningWatcher(server, path / "reports")
        finally:
            server.stop()


def let_through(watcher: RunningWatcher) -> None:
    """Take away what the modes of files keep from others."""
    place = Path(watcher.address)
    place.chmod(0o666)
    place.parent.chmod(0o711)
    place.parent.parent.chmod(0o711)


class TestWithoutLeave:
    @needs_root
    def test_the_way_is_closed_and_the_worker_says_so(self, watcher: RunningWatcher) -> None:
        said = run("become()\nwith hangwatch.expires(0.01, 'theirs'): pass", watcher=watcher)
        assert f"user {UID} may not connect to {watcher.address}" in said
        assert f"--allow-uid {UID}" in said
        assert said.count("runs on unwatched") == 1

    @needs_root
    def test_modes_of_files_keep_it_out(self, start_watcher: StartWatcher) -> None:
        """Either of the two is enough: the folder's mode, and the socket's own."""
        watcher = start_watcher()
        for closed in (Path(watcher.address).parent, Path(watcher.address)):
            let_through(watcher)
            closed.chmod(0o700 if closed.is_dir() else 0o600)
            run("become()\nrefused(socket.socket(1, 5).connect, sys.argv[1])", watcher.address)
        let_through(watcher)
        run("become()\nsocket.socket(1, 5).connect(sys.argv[1])", watcher.address)

    @needs_root
    def test_who_gets_through_is_refused_by_the_kernel_s_word(
        self, start_watcher: StartWatcher
    ) -> None:
        watcher = start_watcher()
        let_through(watcher)
        theirs = start(
            """
become()
with hangwatch.expires(0.05, 'theirs'):
    time.sleep(0.05)
    print('overrun', flush=True)
    sys.stdin.readline()
print('alive')
""",
            watcher=watcher,
            stdin=subprocess.PIPE,
        )
        assert theirs.read_line() == "overrun"
        ours = watcher.connected_worker("import hangwatch\n" + OVERRUNS)
        ours.communicate()
        assert watcher.report(pid=ours.pid)["outcome"] == "reaped"
        out, said = theirs.communicate("go on\n")
        assert f"the watcher serves user 0, this is user {UID}" in said
        assert f"start it with --allow-uid {UID}" in said
        assert "alive" in out, "it overran, and nobody ended it"
        assert [report["worker"]["pid"] for report in watcher.reports()] == [ours.pid]

    def test_no_descriptor_of_a_stranger_becomes_ours(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What closing one does, and for how long, is up to who made it."""
        monkeypatch.setattr(admission, "_receive", lambda _: pytest.fail("it was taken"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        page = memfd()
        with ours, theirs:
            with pytest.raises(BlockingIOError):
                admission.admit(ours, frozenset({ANOTHER}))
            socket.send_fds(theirs, [hello()], [page])
            with pytest.raises(ProtocolError, match=f"this is user {os.geteuid()}"):
                admission.admit(ours, frozenset({ANOTHER}))
            with pytest.raises(BlockingIOError):
                ours.recv(1, socket.MSG_DONTWAIT)
        os.close(page)

    @needs_root
    def test_it_can_t_pretend_that_a_watcher_is_ready(self, folder: Path) -> None:
        """Everybody can read the name that the launcher waits at."""
        pretends = start(
            """
become()
print("ready", flush=True)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
    while True:
        for line in open("/proc/net/unix"):
            name = line.split()[-1]
            if name.startswith(f"@hangwatch-{sys.argv[1]}-"):
                try:
                    sender.sendto(b"READY=1", "\\0" + name[1:])
                except OSError:
                    continue
                print("sent", flush=True)
""",
            os.getpid(),
        )
        try:
            assert pretends.read_line() == "ready"
            (folder / "file").write_text("")
            with pytest.raises(hangwatch.LaunchError, match="before it was ready"):
                hangwatch.SharedMemoryTimerServer(folder / "file").start()
            assert pretends.read_line() == "sent"
        finally:
            pretends.kill()
            pretends.communicate()

    @needs_root
    def test_who_is_another_user_for_a_while_hears_its_own_watcher(self) -> None:
        """The kernel tells a sender's real user, unless it is told to tell the effective one."""
        run(
            f"""
os.seteuid({UID})
ready, watcher = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
watcher.send(b"READY=1")
assert launch._is_of_our_user(ready.recvmsg(100, 100)[1])
"""
        )

    @needs_root
    def test_it_can_read_nothing(self, start_watcher: StartWatcher) -> None:
        watcher = start_watcher()
        let_through(watcher)
        hung = watcher.connected_worker("import hangwatch\n" + OVERRUNS)
        hung.communicate()
        report = watcher.report(pid=hung.pid)
        assert report["outcome"] == "reaped"
        busy = watcher.connected_worker(
            "import hangwatch, time\n"
            "with hangwatch.expires(1000): print('in', flush=True); time.sleep(1000)",
        )
        assert busy.read_line() == "in"
        watcher.report_dir.parent.chmod(0o711)
        (place,) = watcher.report_dir.glob("*/report.json")
        files = [place, place.with_name("report.txt")]
        processes = [watcher.keeper_pid, watcher.pid, busy.pid]
        for pid in processes:
            files += [Path(f"/proc/{pid}/{name}") for name in ("mem", "environ", "maps")]
            files += [
                Path(f"/proc/{pid}/fd/{name}")
                for name in os.listdir(f"/proc/{pid}/fd")
                if "memfd" in os.readlink(f"/proc/{pid}/fd/{name}")
            ]
        assert any("/fd/" in str(path) for path in files), "the worker's page is among them"
        folders = [watcher.report_dir, place.parent, *(f"/proc/{pid}/fd" for pid in processes)]
        run(
            """
become()
files, folders, processes = map(json.loads, sys.argv[1:])
for path in files: refused(open, path)
for path in folders: refused(os.listdir, path)
for pid in processes: refused(os.kill, pid, 0)
""",
            *(json.dumps([str(x) for x in names]) for names in (files, folders)),
            json.dumps(processes),
        )
        busy.kill()
        busy.communicate()

    @needs_root
    def test_a_worker_gives_nothing_to_another_user_s_watcher(self, folder: Path) -> None:
        folder.chmod(0o777)
        said = run(
            f"""
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.seteuid({THIRD_UID})
listener.bind(sys.argv[1])
listener.listen()
os.chmod(sys.argv[1], 0o666)
os.seteuid(0)
if os.fork() == 0:
    become()
    try:
        hangwatch.SharedMemoryTimerClient(sys.argv[1])
    except hangwatch.WatcherUnavailableError as error:
        print(error, flush=True)
    os._exit(0)
connection, _ = listener.accept()
print(socket.recv_fds(connection, 100, 9)[:2])
os.wait()
""",
            folder / "false",
        )
        assert f"belongs to user {THIRD_UID}, not to {UID} or root: start one of your own" in said
        assert "(b'', [])" in said


@needs_root
@needs_rights
class TestAllowed:
    def test_it_is_watched_reaped_and_explained(self, allowing: RunningWatcher) -> None:
        place = Path(allowing.address)
        assert not place.stat().st_mode & 0o007
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o711
        worker = start(HANGS, watcher=allowing)
        worker.communicate()
        assert worker.returncode == -9
        report = allowing.report(pid=worker.pid)
        assert report["outcome"] == "reaped"
        assert report["worker"]["uid"] == UID
        frames = [frame["function"] for t in report["threads"] for frame in t["frames"]]
        assert "stuck_here" in frames

    def test_reports_are_the_watcher_s_alone(self, allowing: RunningWatcher) -> None:
        worker = start(HANGS, watcher=allowing)
        worker.communicate()
        allowing.report(pid=worker.pid)
        (path,) = allowing.report_dir.glob(f"*-{worker.pid}/report.json")
        for name, mode in ((path, 0o600), (path.parent, 0o700), (allowing.report_dir, 0o700)):
            assert (name.stat().st_uid, stat.S_IMODE(name.stat().st_mode)) == (0, mode)
        run("become()\nrefused(open, sys.argv[1])", path)

    def test_a_third_user_does_not_get_to_it(self, allowing: RunningWatcher) -> None:
        said = run(
            f"""
become({THIRD_UID})
refused(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect, sys.argv[1])
with hangwatch.expires(0.01, "theirs"): pass
""",
            allowing.address,
            watcher=allowing,
        )
        assert f"user {THIRD_UID} may not connect to" in said
        assert f"--allow-uid {THIRD_UID}" in said

    def test_without_access_control_lists_it_is_turned_away(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(failpoints.VARIABLE, "kernel.acl=fail:EOPNOTSUPP")
        with allowing_watcher() as watcher:
            assert stat.S_IMODE(Path(watcher.address).stat().st_mode) == 0o666
            said = run(
                f"become({THIRD_UID})\nprint(answer(sys.argv[1], hello(), [memfd()]))",
                watcher.address,
            )
            assert f"serves user 0, {UID}, this is user {THIRD_UID}" in said
            assert f"start it with --allow-uid {THIRD_UID}" in said
            worker = start(HANGS, watcher=watcher)
            worker.communicate()
            assert watcher.report(pid=worker.pid)["worker"]["uid"] == UID

    def test_root_writes_no_error_file_where_the_worker_could_not(
        self, allowing: RunningWatcher, folder: Path
    ) -> None:
        theirs = folder / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, UID, UID)
        precious = folder / "empty"
        precious.write_text("")
        said = {}
        for path in (theirs / "error.json", folder / "new.json", precious):
            worker = start(HANGS, env=allowing.environment(TORCHELASTIC_ERROR_FILE=str(path)))
            worker.communicate()
            report = allowing.report(pid=worker.pid)
            (said[path.name],) = (
                action["result"] for action in report["actions"] if action["action"] == "error file"
            )
        assert said == {
            "error.json": "written",
            "new.json": "failed: Permission denied",
            "empty": "failed: Permission denied",
        }
        assert (theirs / "error.json").stat().st_uid == UID
        assert precious.read_text() == ""
        assert not (folder / "new.json").exists()

    def test_an_error_file_of_another_mount_namespace_is_not_ours(
        self, allowing: RunningWatcher, folder: Path
    ) -> None:
        """There the path is another file's; here it may be anybody's."""
        folder.chmod(0o777)
        path = folder / "error.json"
        worker = start(
            "import ctypes\nassert ctypes.CDLL(None).unshare(0x20000) == 0\n" + HANGS,
            env=allowing.environment(TORCHELASTIC_ERROR_FILE=str(path)),
        )
        worker.communicate()
        assert worker.returncode == -9
        report = allowing.report(pid=worker.pid)
        (said,) = (
            action["result"] for action in report["actions"] if action["action"] == "error file"
        )
        assert said == "failed: in the worker's mount namespace the path is another file's"
        assert not path.exists()

    def test_a_helper_that_became_the_user_is_not_the_user_s(
        self, allowing: RunningWatcher
    ) -> None:
        """It was a fork of root's watcher, and has its memory."""
        run(
            f"""
def forked(act):
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        act()
        os.write(told, b".")
        time.sleep(1000)
    os.close(told)
    assert os.read(ready, 1)
    return pid

def drop():
    error_file.take_rights_of(Identity(worker, {UID}, 0, os.pidfd_open(worker)))

worker = forked(become)
helper = forked(drop)
looker = os.fork()
if looker == 0:
    become()
    assert "\\nUid:\\t{UID}" in open(f"/proc/{{helper}}/status").read()
    refused(os.listdir, f"/proc/{{helper}}/fd")
    refused(open, f"/proc/{{helper}}/mem")
    refused(open, f"/proc/{{helper}}/environ")
    PTRACE_ATTACH = 16
    assert ctypes.CDLL(None).ptrace(PTRACE_ATTACH, helper, 0, 0) == -1
    os._exit(0)
status = os.waitpid(looker, 0)[1]
os.kill(helper, 9)
os.kill(worker, 9)
assert status == 0
"""
        )

    def test_whoever_became_another_user_is_not_signalled(self, allowing: RunningWatcher) -> None:
        """As after a program with the set-user-ID bit: kill(2) would refuse the worker's user."""
        worker = start(
            f"""
os.setresuid({UID}, {UID}, 0)
{CONNECT}
with hangwatch.expires(0.3, "was theirs"):
    os.setresuid(0, 0, 0)
    sys.stdin.read()
print("alive")
""",
            watcher=allowing,
            stdin=subprocess.PIPE,
        )
        report = allowing.report(pid=worker.pid)
        out, _ = worker.communicate("")
        assert worker.returncode == 0
        assert "alive" in out
        assert report["worker"]["uid"] == UID
        assert report["outcome"] == "gone"
        assert report["threads"] == []
        assert [a["action"] for a in report["actions"]] == ["look"]

    def test_who_could_not_be_ended_is_not_taken_in(self, allowing: RunningWatcher) -> None:
        said = run(
            f"os.seteuid({UID})\nprint(answer(sys.argv[1], hello(), [memfd()]))", allowing.address
        )
        assert f"user {UID}, as whom it comes, may not end it" in said

    def test_a_descendant_of_another_user_is_spared(self, allowing: RunningWatcher) -> None:
        worker = start(
            f"""
of_root = subprocess.Popen(["sleep", "1000"])
{JOIN}
own = subprocess.Popen(["sleep", "1000"])
print(of_root.pid, own.pid, flush=True)
with hangwatch.expires(0.3, "theirs"): time.sleep(1000)
""",
            watcher=allowing,
        )
        of_root, own = map(int, worker.read_line().split())
        pidfd = os.pidfd_open(of_root)
        try:
            worker.wait()
            report = allowing.report(pid=worker.pid)
            wait_until(lambda: not is_alive(own), "its own child is killed with it")
            assert is_alive(of_root)
            said = {a["action"]: a["result"] for a in report["actions"]}
            assert f"not sent: it is not user {UID}'s" in said[f"SIGKILL to descendant {of_root}"]
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            worker.communicate()

    def test_a_successor_serves_it_as_well(self) -> None:
        code = f"{JOIN}\nprint('in', flush=True)\nsys.stdin.readline()\n{OVERRUNS}"
        with allowing_watcher() as watcher:
            worker = start(code, watcher=watcher, stdin=subprocess.PIPE)
            assert worker.read_line() == "in"
            os.kill(watcher.pid, signal.SIGKILL)
            worker.write_line()
            assert worker.wait() == -signal.SIGKILL
            worker.close()
            assert watcher.report(pid=worker.pid)["worker"]["uid"] == UID

    def test_run_takes_it_as_well(self, folder: Path) -> None:
        """The socket is where the other user can get to."""
        code = """
print(os.environ["HANGWATCH_ADDRESS"], flush=True)
become()
hangwatch.SharedMemoryTimerClient()
print("connected")
"""
        result = subprocess.run(
            [
                *(sys.executable, "-m", "hangwatch", "run", "--report-dir", str(folder / "r")),
                *("--allow-uid", str(UID), "--", sys.executable, "-c", script(code)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "connected" in result.stdout
        assert result.stdout.startswith("/run/hangwatch-shared/")


class TestOption:
    def test_names_and_numbers(self) -> None:
        assert checked_uid("root") == checked_uid("0") == checked_uid(0) == 0
        mine = os.geteuid()
        assert checked_settings(allow_uids=[mine, str(mine)]).allowed_uids == {mine}

    @pytest.mark.parametrize(
        ("user", "why"),
        [
            ("no such user", "there is no user 'no such user'"),
            ("", "there is no user ''"),
            ("-1", "there is no user '-1'"),
            (-1, "is no user's number"),
            (2**32 - 1, "is no user's number"),
            ("4294967295", "is no user's number"),
            ("a\0b", "there is no user"),
        ],
    )
    def test_who_is_no_user(self, user: int | str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            hangwatch.SharedMemoryTimerServer(allow_uids=[user])

    @pytest.mark.parametrize("users", ["root", 0, None, [True], [1.0], [None]])
    def test_what_is_no_list_of_users(self, users: object) -> None:
        with pytest.raises(TypeError, match=r"user"):
            hangwatch.SharedMemoryTimerServer(allow_uids=users)  # type: ignore[arg-type]

    def test_a_wrong_name_on_the_command_line(self) -> None:
        for command, status in (("serve", 2), ("run", 125)):
            result = subprocess.run(
                [sys.executable, "-m", "hangwatch", command, "--allow-uid", "nobody such", "true"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == status
            assert "there is no user 'nobody such'" in result.stderr

    @pytest.mark.parametrize(("command", "status"), [(["serve"], 1), (["run", "true"], 125)])
    def test_who_is_not_root_is_told_at_once(self, command: list[str], status: int) -> None:
        """kill(2) would refuse; a watcher that can't end anybody is worse than none."""
        become = f"become({THIRD_UID})" if os.geteuid() == 0 else ""
        first, *rest = command
        process = start(
            f"{become}\nhangwatch.cli.main({[first, '--allow-uid', str(ANOTHER), *rest]!r})"
        )
        _, err = process.communicate()
        assert process.returncode == status, err
        assert f"can neither signal nor look into processes of user {ANOTHER}" in err
        assert "start the watcher as root" in err
        assert "Traceback" not in err

    @needs_root
    def test_the_kernel_refuses_an_ordinary_user_s_watcher_indeed(self) -> None:
        run(
            f"""
pid = os.fork()
if pid == 0:
    become({UID})
    os.write(1, b"")
    time.sleep(1000)
while f"Uid:\\t{UID}" not in open(f"/proc/{{pid}}/status").read(): time.sleep(0.01)
helper = os.fork()
if helper == 0:
    become({THIRD_UID})
    refused(signal.pidfd_send_signal, os.pidfd_open(pid), signal.SIGKILL)
    refused(os.listdir, f"/proc/{{pid}}/fd")
    os._exit(0)
status = os.waitpid(helper, 0)[1]
os.kill(pid, 9)
assert status == 0
"""
        )

    @needs_root
    def test_root_without_the_capabilities_is_told_which(self) -> None:
        result = subprocess.run(
            [
                *("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"),
                *(sys.executable, "-m", "hangwatch", "serve", "--allow-uid", str(UID)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert "without CAP_SYS_PTRACE root can't watch" in result.stderr

    def test_whom_everybody_looks_like_can_t_be_allowed(self) -> None:
        """In a user namespace whoever is not mapped is shown by one number."""
        unshare = ["unshare", "--user", "--map-root-user"]
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("no user namespaces here")
        stranger = Path("/proc/sys/kernel/overflowuid").read_text().strip()
        result = subprocess.run(
            [*unshare, sys.executable, "-m", "hangwatch", "serve", "--allow-uid", stranger],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert f"looks like user {stranger}" in result.stderr.replace("\n", " ")

    @needs_root
    @needs_rights
    def test_folders_that_are_not_right(self, folder: Path) -> None:
        (folder / "closed" / "inner").mkdir(parents=True)
        (folder / "closed").chmod(0o700)
        (folder / "closed" / "inner").chmod(0o711)
        (folder / "listed").mkdir()
        (folder / "listed").chmod(0o755)
        with pytest.raises(AddressError, match=r"closed is closed to the users .* chmod 711 it"):
            listen(str(folder / "closed" / "inner" / "sock"), [UID])
        with pytest.raises(AddressError, match=r"listed is open to other users .* chmod 711 it"):
            listen(str(folder / "listed" / "sock"), [UID])
        umask = os.umask(0o077)
        try:
            listen(str(folder / "made" / "sock"), [UID]).close()
        finally:
            os.umask(umask)
        assert stat.S_IMODE((folder / "made").stat().st_mode) == 0o711
        assert stat.S_IMODE((folder / "made" / "sock").stat().st_mode) == 0o660, (
            "of an ACL: its mask"
        )


class TestOwnRights:
    """What a worker must not get out of the rights of its watcher; whoever it is."""

    def test_a_stack_channel_that_is_a_file_is_refused(
        self, watcher: RunningWatcher, tmp_path: Path
    ) -> None:
        """The watcher empties it in the end, and might do so where the worker may only read."""
        precious = tmp_path / "precious"
        precious.write_text("precious")
        for path in (precious, Path("/dev/null"), Path("/dev/shm")):
            if path.is_dir():
                temporary = tempfile.NamedTemporaryFile(dir=path)  # noqa: SIM115
                descriptor = os.dup(temporary.fileno())
                temporary.close()
            else:
                descriptor = os.open(path, os.O_RDONLY)
            page = memfd()
            try:
                said = answer(
                    watcher.address,
                    hello(stacks={"fd": descriptor, "own": 40, "all": 41}),
                    [page, descriptor],
                )
            finally:
                os.close(descriptor)
                os.close(page)
            assert said == "its stack channel is no memfd"
        assert precious.read_text() == "precious"

    def test_what_stands_in_its_place_later_is_not_even_opened(
        self, watcher: RunningWatcher, tmp_path: Path
    ) -> None:
        """Opening a device, or a fifo, may already do something."""
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            worker = watcher.connected_worker(
                """
import os, sys, time, hangwatch
from hangwatch.worker import stack_channel
with hangwatch.expires(60): pass
os.dup2(os.open(sys.argv[1], os.O_PATH), stack_channel._Channel.descriptor.number)
with hangwatch.expires(0.3): time.sleep(1000)
""",
                fifo,
            )
            worker.communicate()
            missing = watcher.report(pid=worker.pid)["missing"]
            assert any("is another file now" in reason for reason in missing)
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            assert poll.poll(0) == [], "nobody has had it open for writing"
        finally:
            os.close(reader)

    def test_the_pid_in_a_hello_is_nobody_s_death(self, watcher: RunningWatcher) -> None:
        with subprocess.Popen(["sleep", "1000"]) as victim:
            worker = watcher.worker(
                """
import os, sys, threading
os.getpid = lambda: int(sys.argv[1])
threading.get_native_id = lambda: int(sys.argv[1])
"""
                + CONNECT
                + "import hangwatch\n"
                + OVERRUNS,
                str(victim.pid),
            )
            worker.communicate()
            assert worker.returncode == -signal.SIGKILL
            assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
            assert victim.poll() is None
            victim.kill()
