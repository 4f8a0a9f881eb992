"""A failing disk makes Orbax and TensorStore print little, and keeps nobody else from printing."""

import asyncio
import errno
import gc
import logging
import sys
import threading
import types
import warnings

import pytest
import tensorstore

from convert.errors import InputError, RunError
from jaxprefix.run.orbax_errors import SaveError, orbax_kept_short, short_reason

IN_ORBAX = """
def fail():
    raise OSError(30, "Read-only file system")

async def fail_later():
    fail()

def tell(logger):
    logger.error("meanwhile")
"""


@pytest.fixture
def orbax():
    """Functions in a file of Orbax's, as far as tracebacks tell."""
    module = types.ModuleType("orbax")
    exec(compile(IN_ORBAX, "/site-packages/orbax/checkpoint/_src/futures/future.py", "exec"), vars(module))
    return module


@pytest.fixture(autouse=True)
def undone():
    """What stays after a failure goes when a test ends."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = threading.excepthook, sys.unraisablehook, [[*logger.filters] for logger in loggers]
    with warnings.catch_warnings():
        yield
    threading.excepthook, sys.unraisablehook, filters = before
    for logger, earlier in zip(loggers, filters, strict=True):
        logger.filters[:] = earlier


def fail_on_the_disk() -> None:
    with pytest.raises(SaveError), orbax_kept_short():
        raise SaveError("checkpoint 4 cannot be saved")


def run_in_thread(target) -> None:
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def test_threads_of_orbax_take_a_line_and_others_their_traceback(orbax, monkeypatch, capsys):
    others = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: others.append(failure.exc_type))
    with orbax_kept_short():
        run_in_thread(orbax.fail)
        run_in_thread(lambda: 1 / 0)
    assert capsys.readouterr().err == "WARNING: a background thread failed: Read-only file system\n"
    assert others == [ZeroDivisionError]
    run_in_thread(orbax.fail)
    assert others == [ZeroDivisionError, OSError]


def test_arrays_that_nobody_awaits_any_more_say_nothing(orbax, caplog):
    async def leave_behind(fail):
        await asyncio.wait([asyncio.create_task(fail())])  # its error is never asked for

    async def fail():
        raise OSError(errno.EROFS, "Read-only file system")

    with orbax_kept_short():
        asyncio.run(leave_behind(orbax.fail_later))
        gc.collect()
        assert not caplog.records
        asyncio.run(leave_behind(fail))
        gc.collect()
        assert "never retrieved" in caplog.text, "of others it is told"
    caplog.clear()
    asyncio.run(leave_behind(orbax.fail_later))
    gc.collect()
    assert "never retrieved" in caplog.text, "without a failure, asyncio goes on as before"


def test_threads_left_behind_say_nothing_after_a_failure(orbax, caplog):
    """If one of a checkpoint's arrays fails, Orbax does not wait for the thread that was to write the metadata."""
    absl = logging.getLogger("absl")
    with orbax_kept_short():
        orbax.tell(absl)
        absl.error("another library")
    before = threading.excepthook
    for error in (InputError("every checkpoint is damaged"), RunError("update 2: the loss is nan")):
        with pytest.raises(type(error)), orbax_kept_short():
            raise error
    assert threading.excepthook is before
    orbax.tell(absl)
    assert caplog.messages == ["another library", "meanwhile"]
    fail_on_the_disk()
    orbax.tell(absl)
    absl.error("another library")
    assert caplog.messages == ["another library", "meanwhile", "another library"]


def test_writes_that_had_not_begun_say_nothing_after_a_failure():
    async def write_fragment(): ...

    def leave_behind():
        write_fragment().__qualname__ = "async_serialize_from_host.<locals>.write_fragment"  # Orbax's

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        leave_behind()
        assert len(told) == 1, "without a failure, the interpreter tells of it"
        fail_on_the_disk()
        leave_behind()
        assert len(told) == 1


def test_closed_loops_say_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: told.append(str(failure.exc_value)))
    with orbax_kept_short():
        for text in ("Event loop is closed", "another"):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert told == ["another"]


@pytest.mark.parametrize("inner_first", [True, False])
def test_runs_in_two_threads_leave_the_callers_errors_alone(orbax, monkeypatch, capsys, inner_first):
    others = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: others.append(failure.exc_type))
    both = [orbax_kept_short(), orbax_kept_short()]
    for run in both:
        run.__enter__()
    (first, last) = reversed(both) if inner_first else both
    first.__exit__(None, None, None)
    run_in_thread(orbax.fail)
    assert "Read-only file system" in capsys.readouterr().err
    last.__exit__(None, None, None)
    run_in_thread(orbax.fail)
    assert others == [OSError], "the caller's hook is back"
    assert not [logger.filters for logger in map(logging.getLogger, ["absl", "asyncio"]) if logger.filters]


def test_failures_in_a_row_leave_one_hook(orbax, monkeypatch):
    others = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: others.append(failure.exc_type))
    fail_on_the_disk()
    first = threading.excepthook
    fail_on_the_disk()
    assert threading.excepthook == first
    assert [len(logging.getLogger(name).filters) for name in ("absl", "asyncio")] == [1, 1]
    with orbax_kept_short():
        pass
    run_in_thread(orbax.fail)
    assert others == [OSError], "a run that ends well puts everything back"


def test_the_root_logger_is_left_to_the_caller(monkeypatch, capsys):
    """absl would give it a handler."""
    import absl.logging

    monkeypatch.setattr(logging.root, "handlers", [])
    (own := logging.getLogger("own")).addHandler(taking := logging.NullHandler())
    for _ in range(2):
        with orbax_kept_short(), orbax_kept_short():
            absl.logging.vlog(1, "saved")
            logging.getLogger("another").warning("told once")
            own.warning("told by its own handler")
        assert not logging.root.handlers
        assert capsys.readouterr().err == "told once\n"
    own.removeHandler(taking)
    monkeypatch.setattr(logging.root, "handlers", [own := logging.NullHandler()])
    with orbax_kept_short():
        absl.logging.vlog(1, "saved")
    assert logging.root.handlers == [own]


def test_the_system_says_why_in_tensorstores_errors(tmp_path):
    (tmp_path / "file").touch()
    store = tensorstore.KvStore.open(f"file://{tmp_path / 'file' / 'folder'}/").result()
    with pytest.raises(ValueError, match="FAILED_PRECONDITION") as error:
        store.write("key", b"value").result()
    assert short_reason(error.value) == "Not a directory"


def test_of_tensorstores_pages_the_beginning_is_told():
    pages = ValueError('DATA_LOSS: no manifest [tensorstore_spec={"driver": "zarr"}]\n more')
    assert short_reason(pages) == "DATA_LOSS: no manifest"
