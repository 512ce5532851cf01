"""What reaches standard output and standard error: results, log records by level and rank, and the end of a program."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moce_ds.common.errors import ConfigError, DataError
from moce_ds.common.host.program import (
    LOG,
    configure_logging,
    progress_bar,
    run_main,
    say,
    set_log_level,
    shared_bar,
    shared_progress,
    warn,
)
from tests.examples.moce_command import run_here

logger = logging.getLogger("moce_ds.data.example")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def usual_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins at the default level, whatever the one before has set."""
    monkeypatch.setenv(LOG, "info")
    monkeypatch.delenv("RANK", raising=False)
    configure_logging()
    yield
    monkeypatch.undo()
    configure_logging()


def log_at_all_levels() -> None:
    logger.debug("details")
    logger.info("progress")
    logger.warning("odd")
    logger.error("lost")


def test_results_go_to_stdout_and_records_to_stderr(capsys: Capture) -> None:
    say("a result")
    log_at_all_levels()
    assert tuple(capsys.readouterr()) == ("a result\n", "progress\nWARNING: odd\nERROR: lost\n")


def test_quiet_hides_progress_only(capsys: Capture) -> None:
    with progress_bar(total=3, disable=False, delay=60) as bar:
        assert not bar.disable
    set_log_level("warning")
    say("a result")
    log_at_all_levels()
    with progress_bar(total=3, disable=False) as bar:
        assert bar.disable
    assert tuple(capsys.readouterr()) == ("a result\n", "WARNING: odd\nERROR: lost\n")


def test_a_shared_bar_shows_the_work_of_all_processes(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two were done before; this process has three of the ten that are left."""
    with shared_bar(3, 10, "work", done=2, delay=0, mininterval=0) as advance:
        for shown in ("5/12", "8/12", "12/12"):
            advance(1)
            assert shown in capsys.readouterr().err
    assert list(shared_progress("abc", 3, 3, "work", delay=0)) == ["a", "b", "c"]
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert list(shared_progress("abc", 3, 9, "work", delay=0)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_verbose_shows_time_rank_level_and_module(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    set_log_level("debug")
    log_at_all_levels()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "[rank 3] DEBUG test_program: details",
        "[rank 3] INFO test_program: progress",
        "[rank 3] WARNING test_program: odd",
        "[rank 3] ERROR test_program: lost",
    ]
    assert all(len(line.split()[0].split(":")) == 3 for line in lines)


def test_other_ranks_log_warnings_with_their_number(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    log_at_all_levels()
    warn("the same on every rank")
    assert capsys.readouterr().err == "[rank 3] WARNING: odd\n[rank 3] ERROR: lost\n"


def test_nothing_in_a_record_commands_the_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger.info("folder %s", "\x1b[2J\nWARNING: forged")
    monkeypatch.setenv("RANK", "\x1b[2J\n0")
    logger.warning("odd")
    assert capsys.readouterr().err == "folder \ufffd[2J\n  WARNING: forged\n[rank \ufffd[2J\ufffd0] WARNING: odd\n"


def test_other_packages_do_not_repeat_records(capsys: Capture) -> None:
    """Such as absl, which adds a handler to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        logger.warning("odd")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "WARNING: odd\n"


def test_the_level_is_that_of_the_environment(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG, "warning")
    run_main(log_at_all_levels)
    assert capsys.readouterr().err == "WARNING: odd\nERROR: lost\n"
    monkeypatch.setenv(LOG, "loud")
    with pytest.raises(ConfigError, match="MOCE_LOG is 'loud', expected one of debug, info, warning"):
        configure_logging()
    assert run_here("--version").err == "Error: MOCE_LOG is 'loud', expected one of debug, info, warning.\n"


def test_child_processes_inherit_the_level() -> None:
    report = (
        "from moce_ds.common.host.program import run_main\nimport logging\n"
        "run_main(lambda: logging.getLogger('moce_ds').info('progress'))"
    )
    child = [sys.executable, "-c", report]
    assert subprocess.run(child, capture_output=True, text=True, timeout=300).stderr == "progress\n"
    set_log_level("warning")
    assert subprocess.run(child, capture_output=True, text=True, timeout=300).stderr == ""


@pytest.mark.parametrize(("option", "shown"), [((), False), (("--quiet",), False), (("-v",), True)])
def test_only_verbose_shows_where_an_error_was_raised(option: tuple[str, ...], shown: bool) -> None:
    said = run_here(*option, "inspect", "nowhere")
    assert said.status == 1 and said.err.splitlines()[-1].startswith("Error: ")
    assert ("Traceback" in said.err) == shown
    assert os.environ[LOG] == "info" and logging.getLogger("moce_ds").level == logging.INFO


def test_verbose_and_quiet_exclude_each_other() -> None:
    said = run_here("--verbose", "--quiet", "inspect", "nowhere")
    assert said.status == 2 and "--verbose and --quiet exclude each other" in said.err


def test_quiet_does_not_hide_an_error(capsys: Capture) -> None:
    def fail() -> None:
        raise DataError("no images")

    set_log_level("warning")
    with pytest.raises(SystemExit) as end:
        run_main(fail)
    assert end.value.code == 1 and capsys.readouterr().err == "Error: no images\n"
