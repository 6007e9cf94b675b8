"""stdout, stderr and signals: a run outlives its reader, and Ctrl-C saves."""
import argparse
import contextlib
import os
import signal
import sys
import threading
import time


class Steady:
    """A text stream that goes on without its reader.

    Writing to a terminal that was closed, to a full disk, or to `| head` after it has left, raises
    an OSError. A long run should not die of it. From then on, what is written is lost.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except BlockingIOError:  # the reader is slow: this text is lost, not the next one
            return len(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self):
        """Send to nowhere what comes, and what the stream has not yet been able to write."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):  # encoding, isatty, ...
        return getattr(self.stream, name)


def any_characters():
    """Let print() write a ? for a character that the terminal or a file lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's stream lacks it
            getattr(sys, name).reconfigure(errors="replace")


def steady_output():
    """Make print() safe, whatever becomes of stdout and stderr: see Steady and any_characters."""
    any_characters()
    for name in ("stdout", "stderr"):
        setattr(sys, name, Steady(getattr(sys, name)))


def progress(what, total, done=0):
    """A tqdm bar for a task of `total` bytes (None: unknown). It shows nothing in its first second.
    """
    # Not above: a script imports this file to be safe from Ctrl-C while it imports what takes long.
    from tqdm import tqdm
    pause = 0.5 if sys.stdout.isatty() else 10  # seconds between updates
    return tqdm(desc=what, initial=done, total=total, unit="B", unit_scale=True, delay=1,
                file=sys.stdout, mininterval=pause)


def quiet_ctrl_c():
    """Ctrl-C during the imports, which take seconds, ends the process without a traceback.

    A script calls listen_to_ctrl_c when they are done. If the parent ignores Ctrl-C, so do we.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def listen_to_ctrl_c():
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with status 2."""

    def __init__(self, script, description):
        super().__init__(prog=script, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (python {self.prog} --help lists every flag)\n")


def counted(number, noun, plural=""):
    """A number with its noun: 1 row, 2 rows."""
    if number != 1:
        noun = plural or noun + "s"
    return f"{number:,} {noun}"


def say_problem(script, message):
    """One line on stderr: what went wrong, and what to do about it."""
    print(f"{script}: " + " ".join(str(message).split()), file=sys.stderr, flush=True)


# torchrun, or the shell. If torchrun dies, its ranks get another parent (not on Windows).
PARENT = os.getppid()


class StopRequest:
    """Ctrl-C, SIGTERM or a terminal that closes: the first signal asks the loop to save and leave.

    Used in a `with`, it puts back what was done about them before. Only the main thread hears them.

    A second one leaves at once. torchrun passes a Ctrl-C on, so that its ranks get it twice: a
    signal within three seconds of the first is taken for the same one. If torchrun was killed, its
    ranks leave, too. nohup makes a process ignore that the terminal closes, and so it remains.
    """

    def __init__(self):
        self.time = None  # when it was asked for
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        numbers = [signal.SIGINT, signal.SIGTERM]
        closes = getattr(signal, "SIGHUP", None)  # Windows has none
        if closes and signal.getsignal(closes) != signal.SIG_IGN:
            numbers.append(closes)
        self.former = {}
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self.handle) for number in numbers}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.under_torchrun:  # a second signal may come while the rank ends
            return
        for number, handler in self.former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's

    def handle(self, number, frame):
        now = time.monotonic()
        if self.time is None:
            self.time = now
            # A signal may come while print() is at work, so this must not be another print().
            with contextlib.suppress(OSError):
                os.write(2, b"stopping soon; once more, after three seconds, stops at once\n")
        elif now > self.time + 3:
            os._exit(130)

    def __bool__(self):
        is_orphan = self.under_torchrun and os.getppid() != PARENT
        return self.time is not None or is_orphan
