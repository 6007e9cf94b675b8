"""How long training takes."""
import time

# The first steps of a process compile and warm up, so they are no measure of speed.
WARM_UP = 3


class Stopwatch:
    """Training time, without evaluations and checkpoints.

    seconds: of the whole run, those before a resume included. timed_steps, timed_seconds: without
    the first WARM_UP steps of this process, for the speed.
    """

    def __init__(self, seconds, step):
        self.seconds = seconds
        self.first = step
        self.since = step  # the step at which the lap began
        self.begin = time.perf_counter()
        self.timed_steps = 0
        self.timed_seconds = 0.0

    def lap(self, step, is_last):
        """The lap ends at this step -> seconds a step."""
        lap = time.perf_counter() - self.begin
        steps = step - self.since
        self.seconds += lap
        # is_last: a run that is shorter than the warm-up has a speed, too.
        if self.since >= self.first + WARM_UP or is_last:
            self.timed_steps += steps
            self.timed_seconds += lap
        return lap / steps

    def speed(self):
        """Steps per second; 0 for a run that had only to be finished."""
        return self.timed_steps / self.timed_seconds if self.timed_steps else 0.0

    def go_on(self, step):
        """The next lap begins."""
        self.since = step
        self.begin = time.perf_counter()
