"""What the person sees, through a real pseudo-terminal and real file descriptors."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from orchestrator.terminal import chatter_to, count, dims, duration


def test_a_progress_line_is_rewritten_in_place_and_never_wraps() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    code = """
from orchestrator.terminal import Terminal
import sys
t = Terminal(sys.stdout)
t.progress("a" * 100)
t.progress("b" * 10)
t.line("stays")
t.finish()
"""
    subprocess.run([sys.executable, "-c", code], stdout=slave, check=True)
    os.close(slave)
    shown = os.read(master, 4096).decode()
    os.close(master)
    screen: list[str] = [""]
    column = 0
    for character in shown:
        if character == "\n":
            screen.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            screen[-1] = screen[-1][:column].ljust(column) + character + screen[-1][column + 1 :]
            column += 1
    assert [line.strip() for line in screen] == ["stays", ""]
    assert max(len(line) for line in screen) < 40


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    master, slave = pty.openpty()
    code = """
import sys
from orchestrator.terminal import Terminal
t = Terminal(sys.stdout)
sys.stdin.readline()
t.progress("step 1")
t.line("cut")
t.finish()
sys.stdout = None
print("alive", file=sys.stderr)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=slave, stderr=pipe, text=True) as process:
        os.close(slave)
        os.close(master)
        _, said = process.communicate("go on\n")
    assert said == "alive\n"


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
from orchestrator.terminal import Terminal
import sys
t = Terminal(sys.stdout)
for step in range(5):
    t.progress(f"step {step}")
t.line("cut")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capfd.readouterr().out == "step 0\ncut\n"


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    code = """
from orchestrator.terminal import Terminal
import sys
t = Terminal(sys.stdout)
for step in range(1000):
    t.line("x" * 1000)
print("survived", file=sys.stderr)
sys.stderr.flush()
import os; os._exit(0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"survived\n"
    process.wait()
    process.stderr.close()


def test_chatter_goes_to_the_log_and_the_terminal_to_the_person(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "ray.log"
    print("before", flush=True)
    with chatter_to(log) as terminal:
        os.write(1, b"from a library\n")
        os.write(2, b"a warning\n")
        subprocess.run(["echo", "from a child"], check=True)
        terminal.line("for the person")
    print("after", flush=True)
    assert capfd.readouterr() == ("before\nfor the person\nafter\n", "")
    assert log.read_text() == "from a library\na warning\nfrom a child\n"


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (8.2, 65, 3723)] == ["8 s", "1:05", "1:02:03"]
    assert [dims(d) for d in ([16, 16], [12, 9], [5])] == ["16 x 2 layers", "12 9", "5"]
    assert [count(n) for n in (950, 12_340, 4_560_000)] == ["950", "12.3k", "4.56M"]
