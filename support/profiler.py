"""Where the time of a training step goes."""
import torch


def profile(trainer):
    """Print where the time of 20 steps goes, after 10 steps to warm up."""
    for step in range(10):
        trainer.step(step)
    # The profiler's records fragment the heap. Free enough memory now, so that no step has to ask
    # the operating system for more: that would cost time that a run does not pay.
    blocks = [torch.ones(2**22) for _ in range(32)]
    del blocks
    profiler = torch.profiler.profile()
    profiler.start()
    for step in range(10, 30):
        trainer.step(step)
    profiler.stop()
    key = "self_cuda_time_total" if trainer.cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60)
    if trainer.rank == 0:
        print(table)
