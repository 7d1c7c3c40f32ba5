"""Leases: of stopped processes, and on filesystems without locks."""

import errno
import fcntl
import multiprocessing
import os
import platform
import signal

import pytest

from sparse_nb.networks.training import Recipe
from sparse_nb.runs.attempts import _attempt_folder, _take_lock, holder, lease
from sparse_nb.runs.store import Store
from sparse_nb.study.experiments import Experiment

ONE = Experiment("digits", "mlp", width=8, depth=1, budget=592, seed=0, recipe=Recipe(epochs=1))
processes = multiprocessing.get_context("forkserver")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_filesystem_without_locks_is_named_with_a_remedy(number, store, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no file locks.*--runs.*mount") as caught, lease(store, ONE):
        pass
    assert caught.value.errno == number and str(_attempt_folder(store, ONE)) in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == len(before)  # nothing is left open


def test_another_error_of_a_lock_stays_what_it_is(store, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        _take_lock(store.root / "lease")


def hold(root, ready):
    with lease(Store(root), ONE) as alone:
        assert alone
        ready.set()
        signal.pause()


def test_who_waits_can_say_for_whom(store):
    assert holder(store, ONE) is None
    ready = processes.Event()
    process = processes.Process(target=hold, args=(store.root, ready))
    process.start()
    assert ready.wait(60)
    try:
        with lease(store, ONE) as alone:
            assert not alone and holder(store, ONE) == (process.pid, platform.node(), False)
        assert str(holder(store, ONE)) == f"process {process.pid}"
        os.kill(process.pid, signal.SIGSTOP)
        while not holder(store, ONE).stopped:
            pass
        with lease(store, ONE) as alone:
            assert not alone
        assert f"process {process.pid}, which is stopped" in str(holder(store, ONE))
        assert f"kill -CONT {process.pid}" in str(holder(store, ONE))
    finally:
        process.kill()
        process.join()
    assert holder(store, ONE) is None
    with lease(store, ONE) as alone:
        assert alone and holder(store, ONE).pid == os.getpid()
    assert holder(store, ONE) is None


def test_a_holder_elsewhere_is_named_with_its_machine(store):
    path = _attempt_folder(store, ONE) / "lease"
    path.parent.mkdir(parents=True)
    path.write_text('[12, "node7"]')
    assert holder(store, ONE) == (12, "node7", None) and str(holder(store, ONE)) == "process 12 on node7"
    for odd in (
        "",
        "[]",
        "[1]",
        '["x", "node7"]',
        "{}",
        f'[{10**40}, "{platform.node()}"]',
        f'[-1, "{platform.node()}"]',
    ):
        path.write_text(odd)
        assert holder(store, ONE) is None
