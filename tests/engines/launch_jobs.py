"""Functions that ``test_launch`` has its pools run."""

import os
import signal

import torch
import torch.distributed as dist


def total(ctx, value):
    """The sum over ranks of value + rank."""
    x = torch.tensor(float(value + ctx.rank))
    dist.all_reduce(x)
    return {"rank": ctx.rank, "pid": os.getpid(), "sum": x.item(), "threads": torch.get_num_threads()}


def length(ctx, text):
    return len(text)


def count(ctx, upto):
    for step in range(upto):
        ctx.progress(step=step, rank=ctx.rank)


def meet(ctx, absent, how):
    """All ranks but one meet in a collective; that one does something else."""
    ctx.progress(pid=os.getpid())
    if ctx.rank != absent:
        dist.all_reduce(torch.ones(1))
    elif how == "raise":
        raise ValueError("a bad batch")
    elif how == "exit":
        os._exit(0)
    else:
        signal.pause()


def unserialisable(ctx):
    return {1, 2}
