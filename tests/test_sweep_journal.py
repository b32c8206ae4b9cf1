"""A journal file whose writer was stopped within a line: trials stay, the next write mends it. Real Optuna, real processes."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from dann_experiments import InputError
from sweeps.study import Slot, Sweep, open_storage

JOURNAL = Path("journal.log")


@pytest.fixture
def study(empty_place) -> Sweep:
    """Two waiting trials and a complete one."""
    found = Sweep.create(open_storage(str(JOURNAL)), "s", maximizes=True)
    found.add([Slot("search", {"seed": number}) for number in range(3)])
    trial = found.claim("host:1:0", "t")
    assert trial is not None
    found.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5])
    return found


def opened() -> Sweep:
    return Sweep(open_storage(str(JOURNAL)), "s")


def values(study: Sweep) -> list[tuple[str, list[float] | None]]:
    return [(trial.state.name, trial.values) for trial in study.trials()]


def test_a_journal_cut_off_anywhere_in_its_last_line_opens_before_and_after_the_next_write(study, caplog):
    whole = JOURNAL.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    without_last = [("RUNNING", None), ("WAITING", None), ("WAITING", None)]
    ended = [("COMPLETE", [0.5]), *without_last[1:]]
    for end in range(start + 1, len(whole)):
        JOURNAL.write_bytes(whole[:end])
        caplog.clear()
        again = opened()
        assert values(again) == without_last  # Optuna does not read a line that has no end
        again.add([Slot("search", {})])
        only_the_end_is_missing = end == len(whole) - 1
        assert values(opened())[:3] == (ended if only_the_end_is_missing else without_last)
        assert len(opened().trials()) == 4
        assert ("lacked the end" if only_the_end_is_missing else f"the {end - start} bytes were cut off") in caplog.text


def test_a_process_that_has_the_journal_open_mends_what_another_left(study):
    whole = JOURNAL.read_bytes()
    JOURNAL.write_bytes(whole + b'{"op_code":8,"worker_id":"x","trial_id":1,"user_att')
    study.note(study.trials()[1], seen=True)
    assert opened().trials()[1].user_attrs["seen"] is True
    assert values(opened())[0] == ("COMPLETE", [0.5])


def test_zeros_that_a_power_failure_leaves_at_the_end_are_cut_off(study):
    JOURNAL.write_bytes(JOURNAL.read_bytes() + b"\0" * 100_000)
    opened().add([Slot("search", {})])
    assert len(opened().trials()) == 4
    assert b"\0" not in JOURNAL.read_bytes()


def test_a_whole_journal_is_left_as_it_is_and_nothing_is_logged(study, caplog):
    before = JOURNAL.read_bytes()
    opened()
    assert JOURNAL.read_bytes() == before
    opened().add([Slot("search", {})])
    assert JOURNAL.read_bytes().startswith(before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


FORK = multiprocessing.get_context("fork")  # the children have everything imported


def write_to_a_full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    found = opened()
    resource.setrlimit(resource.RLIMIT_FSIZE, (JOURNAL.stat().st_size + 40, resource.RLIM_INFINITY))
    with pytest.raises(OSError):
        found.add([Slot("search", {})])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert JOURNAL.read_bytes()[-1:] != b"\n"
    found.add([Slot("search", {})])


def test_a_process_goes_on_when_a_full_disk_has_room_again(study):
    process = FORK.Process(target=write_to_a_full_disk)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(opened().trials()) == 4


def add_ten(number: int) -> None:
    opened().add([Slot("search", {"seed": 100 * number + count}) for count in range(10)])


def test_processes_that_open_a_cut_journal_at_once_lose_no_trial(study):
    JOURNAL.write_bytes(JOURNAL.read_bytes() + b'{"op_code":4,"work')
    processes = [FORK.Process(target=add_ten, args=(number,)) for number in range(1, 4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    seeds = {trial.user_attrs["overrides"]["seed"] for trial in opened().trials()}
    assert seeds == {0, 1, 2, *(100 * number + count for number in range(1, 4) for count in range(10))}


def damage(line: bytes, kind: str) -> bytes:
    return {
        "glued": line[:20] + line,  # what an unfinished line and the next record became in earlier versions
        "no JSON": b"hello\n", "empty": b"\n", "zeros": b"\0" * 30 + b"\n", "a list": b"[1]\n", "not text": b"\xff\xfe\n",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["glued", "no JSON", "empty", "zeros", "a list", "not text"])
def test_a_damaged_line_is_refused_by_its_number_wherever_it_stands(study, kind):
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    for number in (2, len(lines)):
        JOURNAL.write_bytes(b"".join([*lines[: number - 1], damage(lines[number - 1], kind), *lines[number:]]))
        before = JOURNAL.read_bytes()
        with pytest.raises(InputError, match=rf"journal\.log', whose line {number} is damaged.*remove that line"):
            opened()
        assert JOURNAL.read_bytes() == before


def test_the_lock_is_given_back_when_the_file_cannot_be_mended(study):
    shutil.move(JOURNAL, "elsewhere")
    with pytest.raises(FileNotFoundError):
        study.add([Slot("search", {})])
    shutil.move("elsewhere", JOURNAL)
    assert not list(Path().glob("*.lock"))
    study.add([Slot("search", {})])
    assert len(opened().trials()) == 4


def write_for_ever() -> None:
    found = opened()
    while True:
        found.add([Slot("search", {"x": "y" * 200_000})])


def test_a_killed_writer_costs_no_trial(study):
    process = FORK.Process(target=write_for_ever)
    process.start()
    while JOURNAL.stat().st_size < 3_000_000:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    Path("journal.log.lock").unlink(missing_ok=True)  # Optuna would wait for half a minute
    count = len(opened().trials())
    opened().add([Slot("search", {})])
    assert len(opened().trials()) in (count + 1, count + 2)  # the last record may have lacked the end of its line alone
