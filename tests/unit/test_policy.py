"""What an overrun leads to: one value, made of what the block and the server chose."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from fractions import Fraction
from math import inf, nan

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hangwatch
from hangwatch.cli.commands import main
from hangwatch.policy import (
    DEFAULT,
    LONGEST_GRACE,
    NO_SIGNAL,
    NOTHING_CHOSEN,
    OPTIONS,
    USUAL_GRACE,
    OnExpiry,
    Policy,
    checked,
    decide,
    from_words,
    to_words,
)
from hangwatch.watcher.settings import Settings, checked_settings
from support.pages import QuietClient, quiet_page

REPORT, RAISE, REAP = OnExpiry


@pytest.fixture
def client() -> Iterator[QuietClient]:
    with quiet_page() as client:
        yield client


class TestDecide:
    @pytest.mark.parametrize("server", OnExpiry)
    @pytest.mark.parametrize("block", [None, *OnExpiry])
    def test_who_says_what_happens(self, block: OnExpiry | None, server: OnExpiry) -> None:
        chosen, default = Policy(block), DEFAULT._replace(on_expiry=server)
        assert decide(chosen, default).on_expiry is (block or server)
        assert decide(chosen, default._replace(force=True)).on_expiry is server
        assert decide(chosen, default, spared=True).on_expiry is REPORT
        assert decide(chosen, default._replace(force=True), spared=True).on_expiry is REPORT
        for force in (False, True):
            never = chosen._replace(signal=NO_SIGNAL)
            assert decide(never, default._replace(force=force)).on_expiry is REPORT

    @pytest.mark.parametrize(
        ("block", "server", "steps"),
        [
            # What is sent first, the seconds that it has, and those that TimerExpired has.
            (Policy(), DEFAULT, (signal.SIGKILL, USUAL_GRACE, USUAL_GRACE)),
            (Policy(), DEFAULT._replace(grace=3.0), (signal.SIGTERM, 3.0, 3.0)),
            (Policy(), DEFAULT._replace(grace=0.0), (signal.SIGKILL, 0.0, USUAL_GRACE)),
            (Policy(), DEFAULT._replace(signal=12), (12, USUAL_GRACE, USUAL_GRACE)),
            (Policy(), DEFAULT._replace(signal=12, grace=0.0), (12, 0.0, USUAL_GRACE)),
            (Policy(), DEFAULT._replace(signal=12, grace=3.0), (12, 3.0, 3.0)),
            (Policy(grace=0.0), DEFAULT._replace(grace=3.0), (signal.SIGKILL, 0.0, USUAL_GRACE)),
            (Policy(grace=4.0), DEFAULT._replace(grace=3.0), (signal.SIGTERM, 4.0, 4.0)),
            (Policy(grace=4.0), DEFAULT, (signal.SIGTERM, 4.0, 4.0)),
            (Policy(signal=10), DEFAULT, (10, USUAL_GRACE, USUAL_GRACE)),
            (Policy(signal=10, grace=0.0), DEFAULT, (10, 0.0, USUAL_GRACE)),
            (Policy(signal=10), DEFAULT._replace(signal=12, grace=3.0), (10, 3.0, 3.0)),
            (Policy(signal=10, grace=1.0), DEFAULT._replace(signal=12), (10, 1.0, 1.0)),
        ],
    )
    def test_which_signal_and_which_grace(
        self, block: Policy, server: Policy, steps: tuple[int, float, float]
    ) -> None:
        policy = decide(block, server)
        assert (policy.first_signal, policy.signal_grace, policy.raise_grace) == steps
        forced = decide(block, server._replace(force=True))
        assert (forced.first_signal, forced.signal_grace, forced.raise_grace) == steps

    @pytest.mark.parametrize("name", ["tree", "stacks", "kill_debugged"])
    def test_the_rest_is_the_server_s(self, name: str) -> None:
        for value in (True, False):
            server = DEFAULT._replace(**{name: value})
            assert getattr(decide(NOTHING_CHOSEN, server), name) is value

    def test_a_spared_process_is_told_by_its_number(self) -> None:
        settings = Settings(spared_pid=7)
        assert settings.decide(NOTHING_CHOSEN, 7).on_expiry is REPORT
        assert settings.decide(NOTHING_CHOSEN, 8).on_expiry is REAP

    def test_nothing_is_left_open_but_what_follows_from_the_rest(self) -> None:
        policy = decide(NOTHING_CHOSEN, DEFAULT)
        assert {name for name, value in policy._asdict().items() if value is None} == {
            "grace",
            "signal",
        }

    def test_it_is_a_value(self) -> None:
        policy = Policy(REAP, 1.0, 10)
        assert pickle.loads(pickle.dumps(policy)) == policy
        assert {policy: 1}[Policy(REAP, 1.0, 10)] == 1
        with pytest.raises(AttributeError):
            policy.grace = 2.0
        with pytest.raises(AttributeError):
            policy.grade = 2.0  # type: ignore[attr-defined]


class TestWords:
    @given(
        st.sampled_from([None, *OnExpiry]),
        st.none() | st.floats(0.0, LONGEST_GRACE),
        st.sampled_from([None, NO_SIGNAL, *range(1, 65)]),
    )
    def test_what_a_block_chose_survives_them(
        self, on_expiry: OnExpiry | None, grace: float | None, number: int | None
    ) -> None:
        chosen = Policy(on_expiry, grace, number)
        assert from_words(*to_words(chosen)) == chosen

    def test_a_page_of_zeros_chooses_nothing(self) -> None:
        assert to_words(NOTHING_CHOSEN) == (0, 0, 0.0)
        assert from_words(0, 0, 0.0) == NOTHING_CHOSEN

    @given(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.floats())
    def test_whatever_the_page_says_it_is_a_policy(
        self, flags: int, number: int, grace: float
    ) -> None:
        chosen = from_words(flags, number, grace)
        assert chosen.on_expiry in (None, *OnExpiry)
        assert chosen.signal in (None, NO_SIGNAL, *range(1, 65))
        assert chosen.grace is None or 0 <= chosen.grace <= LONGEST_GRACE
        assert chosen[3:] == NOTHING_CHOSEN[3:], "no page takes from the server what is its own"


BAD_CHOICES: list[tuple[dict[str, object], type[Exception], str]] = [
    (
        {"on_expiry": "kill"},
        ValueError,
        "on_expiry must be 'report', 'raise' or 'reap', not 'kill'",
    ),
    ({"on_expiry": 3}, ValueError, "on_expiry must be 'report', 'raise' or 'reap', not 3"),
    ({"grace": -1}, ValueError, "grace must be a finite number of seconds, 0 or more, not -1"),
    ({"grace": nan}, ValueError, "grace must be a finite number of seconds, 0 or more, not nan"),
    ({"grace": inf}, ValueError, "for a worker that is never killed, on_expiry='report'"),
    ({"grace": 10**400}, ValueError, "for a worker that is never killed, on_expiry='report'"),
    ({"grace": "1"}, TypeError, "grace must be a number of seconds, not str"),
    ({"grace": True}, TypeError, "grace must be a number of seconds, not bool"),
    ({"grace": []}, TypeError, "grace must be a number of seconds, not list"),
    ({"grace": timedelta(seconds=1)}, TypeError, "give its total_seconds()"),
    ({"signal": 0}, ValueError, "for no signal at all, on_expiry='report'"),
    ({"signal": -1}, ValueError, "for no signal at all, on_expiry='report'"),
    ({"signal": 65}, ValueError, "signal must be a signal's number, 1 to 64, not 65"),
    ({"signal": "TERM"}, TypeError, "such as signal.SIGTERM, not 'TERM'"),
    ({"signal": True}, TypeError, "such as signal.SIGTERM, not True"),
]


class TestBadValues:
    @pytest.mark.parametrize(("choice", "error", "says"), BAD_CHOICES)
    def test_a_block_and_a_server_say_the_same(
        self, client: QuietClient, choice: dict[str, object], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error) as of_block:
            hangwatch.expires(1000, "bad", **choice)  # type: ignore[arg-type]
        assert client.armed() == {}
        with pytest.raises(error) as of_server:
            hangwatch.SharedMemoryTimerServer(**choice)  # type: ignore[arg-type]
        assert str(of_block.value) == str(of_server.value)
        assert says in str(of_block.value)

    @pytest.mark.parametrize(
        ("option", "error", "says"),
        [
            ({"force": 1}, TypeError, "force must be True or False, not 1"),
            ({"tree": "no"}, TypeError, "tree must be True or False, not 'no'"),
            ({"stacks": 0}, TypeError, "stacks must be True or False, not 0"),
            ({"kill_debugged": []}, TypeError, "kill_debugged must be True or False"),
            ({"gap": 0}, ValueError, "gap must be positive and finite, not 0: leave it out"),
            ({"gap": inf}, ValueError, "gap must be positive and finite, not inf: leave it out"),
            ({"gap": "1"}, TypeError, "gap must be a number of seconds, not str"),
            ({"report_dir": 3}, TypeError, "report_dir must be a path, or None for no reports"),
            ({"report_dir": "a\0b"}, ValueError, "give another path"),
            ({"on_event": 3}, TypeError, "on_event must be callable"),
            ({"stack": False}, TypeError, "there is no option 'stack': there are on_event, "),
            ({"spared_pid": 3}, TypeError, "there is no option 'spared_pid'"),
        ],
    )
    def test_of_a_server_alone(
        self, option: dict[str, object], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error) as raised:
            hangwatch.SharedMemoryTimerServer(**option)  # type: ignore[arg-type]
        assert says in str(raised.value)

    @pytest.mark.parametrize("command", ["run", "serve"])
    @pytest.mark.parametrize(
        ("option", "says"),
        [
            (["--on-expiry", "kill"], "'report', 'raise', 'reap'"),
            (["--grace", "-1"], "0 or more"),
            (["--grace", "nan"], "0 or more"),
            (["--signal", "65"], "SIGTERM, TERM or 15"),
            (["--gap", "0"], "more than 0"),
        ],
    )
    def test_on_the_command_line(
        self, capsys: pytest.CaptureFixture[str], command: str, option: list[str], says: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main([command, *option, "true"])
        assert ended.value.code == {"run": 125, "serve": 2}[command]
        assert says in capsys.readouterr().err


def test_what_a_server_may_be_told() -> None:
    nothing = checked_settings(report_dir=None)
    assert nothing == Settings(allowed_uids=frozenset({os.geteuid()}))
    nones = dict.fromkeys(OPTIONS)
    assert checked_settings(report_dir=None, **nones) == nothing  # type: ignore[arg-type]
    told = checked_settings(
        on_expiry="raise",
        grace=Fraction(1, 2),  # type: ignore[arg-type]
        signal=signal.SIGUSR1,
        tree=False,
        gap=3,
    )
    assert told.policy == DEFAULT._replace(on_expiry=RAISE, grace=0.5, signal=10, tree=False)
    assert type(told.policy.signal) is int
    assert (told.gap, told.report_dir) == (3.0, os.path.abspath("hangwatch-reports"))
    assert checked_settings(**told.options()) == told  # type: ignore[arg-type]


def test_every_option_is_a_field_and_stands_on_the_command_line() -> None:
    assert Policy._fields == tuple(OPTIONS) == tuple(Policy.__annotations__)
    assert checked(DEFAULT) == DEFAULT
    for command, missing in (("serve", set()), ("run", {"force"})):
        names = {parameter.name for parameter in main.commands[command].params}
        assert OPTIONS.keys() - names == missing


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_no_option_is_hidden(command: click.Command) -> None:
    shown = command.get_help(click.Context(command))
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert not parameter.hidden
            for words in (*parameter.opts, *parameter.secondary_opts):
                assert words in shown


@pytest.mark.parametrize("option", ["--lifeline", "--events-to", "--spare"])
def test_what_only_a_launcher_says_is_no_option(option: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hangwatch", "serve", option, "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"No such option '{option}'" in result.stderr
