"""What several processes say to one another, on a service that is not there; `tests/test_together.py` has real ones."""

from __future__ import annotations

import json
import threading
import time

import jax
import numpy as np
import pytest

from mpjax.core import processes
from mpjax.train import spread


class Service:
    """The key-value store of `jax.distributed`, where process 1 says what it is told to, or nothing."""

    def __init__(self, word: str | None):
        self.word, self.kept, self.waited = word, {}, []

    def key_value_set(self, key: str, value: str) -> None:
        self.kept[key] = value

    def key_value_delete(self, key: str) -> None:
        del self.kept[key]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key.endswith("/1") and self.word is not None:
            return self.word
        if key not in self.kept:
            self.waited.append(milliseconds)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key")
        return self.kept[key]


def talk(monkeypatch, word: str | None) -> Service:
    service = Service(word)
    jax.devices()  # a backend that started later would ask this service for more than it has
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.distributed.global_state, "client", service)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_said", processes.collections.Counter())
    return service


def test_who_does_not_come_is_named_after_the_time_that_was_stated(monkeypatch):
    service = talk(monkeypatch, None)
    with pytest.raises(
        TimeoutError, match=r"process 1 of 2 did not come to the save of step 3 within 7 s.*start all of"
    ):
        processes.gather("a", "the save of step 3", seconds=7)
    (waited,) = service.waited
    assert 6000 < waited <= 7000


def test_who_speaks_about_something_else_is_named(monkeypatch):
    talk(monkeypatch, json.dumps(["a restore", ""]))
    with pytest.raises(RuntimeError, match="process 0 is at a save, process 1 at a restore; legal are the same calls"):
        processes.gather("a", "a save")


def test_nothing_that_was_said_stays_once_all_have_heard_it(monkeypatch):
    service = talk(monkeypatch, json.dumps(["a save", "one"]))
    for _ in range(5):
        assert processes.gather("a", "a save", "zero") == ["zero", "one"]
    assert list(service.kept) == ["mpjax/a/4/0"]


def test_the_first_word_that_is_posted_stays(monkeypatch):
    """And an error that is none of these two is raised."""
    service = talk(monkeypatch, None)

    def once(key: str, value: str) -> None:
        if key in service.kept:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
        service.kept[key] = value

    def found(key: str) -> str:
        if key not in service.kept:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return service.kept[key]

    service.key_value_set, service.key_value_try_get = once, found
    assert processes.posted("stop") is None
    processes.post("stop", "5")
    processes.post("stop", "7")
    assert processes.posted("stop") == "5"

    def broken(*_: str) -> str:
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")

    service.key_value_set = service.key_value_try_get = service.blocking_key_value_get = broken
    for talks in (
        lambda: processes.post("stop", "9"),
        lambda: processes.posted("stop"),
        lambda: processes.gather("a", "b"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
            talks()


def test_one_process_alone_asks_nobody():
    assert processes.is_first() and not processes.several()
    assert processes.gather("a", "b", "word") == ["word"]
    x = processes.put(np.float32([1, 2]), jax.sharding.SingleDeviceSharding(jax.devices()[1]))
    assert x.devices() == {jax.devices()[1]} and x.tolist() == [1, 2]


def test_a_key_has_the_digest_of_its_data():
    assert processes.digest(jax.random.key(1)) == processes.digest(jax.random.key_data(jax.random.key(1)))
    assert processes.digest(jax.random.key(1)) != processes.digest(jax.random.key(2))


def test_threads_that_bring_the_first_batch_speak_once(monkeypatch):
    """Four threads of `prefetch` at one time, and a service that takes its time: one of them meets the other processes."""
    said, begun = [], threading.Barrier(4)

    def gather(topic: str, about: str) -> None:
        said.append(about)
        time.sleep(0.05)

    monkeypatch.setattr(spread, "gather", gather)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])

    def bring() -> None:
        begun.wait(30)
        spread.own_rows(np.zeros((1, 7, 11, 13)), mesh, "data")  # a shape that no other test has

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(said) == 1
