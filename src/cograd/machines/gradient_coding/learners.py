"""What is trained, and how a worker answers a task: the gradient of a chunk, the same on every worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cograd.core.message import Payload
from cograd.core.space import ParamSpace, trainable
from cograd.core.streams import seed_for
from cograd.machines.gradient_coding.schemes import MiniTask, Scheme


@dataclass
class Learner:
    """One of the models that are trained in turn.

    Args:
        model: its trainable parameters share one dtype, float32 or float64. A module that mixes the samples of
            a batch in training (BatchNorm) or counts them (running statistics) must be in eval mode.
        optimizer: any, over the model's parameters. It steps on the mean gradient of the job's samples.
        loss: ``loss(model, rows)``, the *sum* of the losses of these samples. Random numbers that it draws from
            torch (dropout, augmentation) are seeded anew for every chunk.
        batch: ``batch(step)``, the rows of the data (int64, 1-D) of a step: a pure function, as every worker
            calls it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Tensor], Tensor]
    batch: Callable[[int], Tensor]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators of the CPU and of a device from a seed, and afterwards as they were.

    The CPU's is set by itself: `torch.manual_seed` would queue a call for every kind of accelerator each time.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


class Bench:
    """Where tasks are computed: the learners, and the scheme that says which samples a chunk holds.

    ``dtype`` is that of the vectors that are sent, float32 or float64. Every party that builds one from the
    same learners, scheme and seed gives the same answers. Memory a task: s + 1 gradients.

    Raises ValueError for models that are not alike, not of one float dtype or with a module in training mode
    that does not keep samples apart; TypeError for another ``dtype``.
    """

    def __init__(
        self, learners: Sequence[Learner], scheme: Scheme, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        if not learners:
            raise ValueError("learners must hold at least one; got none")
        self.learners, self.scheme, self.dtype, self.seed = list(learners), scheme, dtype, seed
        self.spaces = [ParamSpace.of(learner.model) for learner in self.learners]
        self.parameters = [trainable(learner.model) for learner in self.learners]
        kinds = {p.dtype for parameters in self.parameters for p in parameters.values()}
        if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
            raise ValueError(f"all parameters must be of one dtype, float32 or float64; got {kinds}")
        if len({space.numel for space in self.spaces}) > 1:
            raise ValueError(
                f"models must be of one size; got {[space.numel for space in self.spaces]} parameters"
            )
        self.weights_dtype = kinds.pop()
        self.device = next(iter(self.parameters[0].values())).device
        self._cut: dict[int, tuple[Tensor, ...]] = {}
        self._loaded: dict[int, int] = {}
        self.refuse_mixing()

    @property
    def numel(self) -> int:
        return self.spaces[0].numel

    def refuse_mixing(self) -> None:
        """Raise ValueError if a module in training mode would tie a sample's gradient to its neighbours in the
        chunk, or count what it sees."""
        for index, learner in enumerate(self.learners):
            for name, module in learner.model.named_modules():
                mixes = isinstance(module, nn.modules.batchnorm._BatchNorm)
                counts = bool(getattr(module, "track_running_stats", False))
                if module.training and (mixes or counts):
                    raise ValueError(
                        f"model {index}: {name!r} ({type(module).__name__}) is in training mode, where a "
                        "chunk's gradient is not the sum of its samples': call .eval() on it, or use GroupNorm"
                    )

    def learner_of(self, job: int) -> int:
        """Jobs go round the models."""
        return job % len(self.learners)

    def chunks(self, job: int) -> tuple[Tensor, ...]:
        """A job's samples, cut by the scheme's shares; the last M jobs' are kept."""
        if job not in self._cut:
            rows = self.learners[self.learner_of(job)].batch(job // len(self.learners))
            shares = self.scheme.shares
            if rows.ndim != 1 or len(rows) < len(shares):
                raise ValueError(
                    f"a job must have one sample a chunk or more, {len(shares)} for {self.scheme!r}; "
                    f"step {job // len(self.learners)} has rows of shape {tuple(rows.shape)}"
                )
            cuts = np.rint(np.cumsum(shares) / shares.sum() * len(rows)).astype(np.int64)
            self._cut[job] = rows.tensor_split(cuts[:-1].tolist())
            self._cut.pop(job - len(self.learners), None)
        return self._cut[job]

    def samples(self, task: MiniTask, base: int) -> int:
        """Samples that a task touches."""
        chunks = self.chunks(base + task.job)
        return sum(len(chunks[c]) for c in task.chunks)

    def restart(self, scheme: Scheme) -> None:
        """Cut the coming jobs for another scheme."""
        self.scheme = scheme
        self._cut.clear()

    def answer(self, worker: int, tasks: Sequence[MiniTask], base: int) -> list[Tensor]:
        """A worker's vectors (numel,), one a task; job ``t`` of the scheme is job ``base + t`` of the run."""
        return [self._answer(worker, task, base + task.job) for task in tasks]

    def _answer(self, worker: int, task: MiniTask, job: int) -> Tensor:
        parts = torch.empty(len(task.chunks), self.numel, dtype=self.dtype, device=self.device)
        for row, chunk in zip(parts, task.chunks, strict=True):
            self.gradient(job, chunk, out=row)
        return self.scheme.code.encode(worker, parts) if task.coded else parts.sum(0)

    def gradient(self, job: int, chunk: int, out: Tensor) -> None:
        """Sum of the gradients of a chunk's samples, into ``out`` (numel,)."""
        index, rows = self.learner_of(job), self.chunks(job)[chunk]
        if not len(rows):
            out.zero_()
            return
        learner, parameters = self.learners[index], self.parameters[index]
        with seeded(seed_for(self.seed, "chunk", job, chunk), self.device), torch.enable_grad():
            loss = learner.loss(learner.model, rows)
            grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        self.spaces[index].flatten(dict(zip(parameters, grads, strict=True)), out=out)

    def weights(self, job: int) -> Tensor:
        """The weights (numel,) that a job's model has now: those of the job, as only one is in flight."""
        index = self.learner_of(job)
        return self.spaces[index].flatten({name: p.detach() for name, p in self.parameters[index].items()})

    @torch.no_grad()
    def load(self, job: int, weights: Tensor) -> None:
        """Put a job's weights into its model. The model keeps them for the job's retries."""
        index = self.learner_of(job)
        for name, value in self.spaces[index].views(weights).items():
            self.parameters[index][name].copy_(value)
        self._loaded[index] = job

    def holds(self, job: int) -> bool:
        """Whether a job's weights were loaded, and those of no later job of its model."""
        return self._loaded.get(self.learner_of(job)) == job

    def step(self, job: int, total: Tensor) -> None:
        """Step a job's optimizer on its decoded gradient: the sum over its samples, divided by their number."""
        index = self.learner_of(job)
        mean = total / sum(map(len, self.chunks(job)))
        for name, value in self.spaces[index].views(mean).items():
            self.parameters[index][name].grad = value.to(self.device, self.weights_dtype)
        self.learners[index].optimizer.step()
        self.learners[index].optimizer.zero_grad(set_to_none=True)

    def split(self, payload: Payload, count: int) -> list[Tensor]:
        """A worker's payload -> its vectors. Raises ValueError for another size."""
        expected = count * self.numel * self.dtype.itemsize
        if len(payload) != expected:
            raise ValueError(
                f"{count} vectors of {self.numel} {self.dtype} are {expected} bytes; got {len(payload)}"
            )
        return list(torch.frombuffer(bytearray(payload), dtype=self.dtype).view(count, self.numel))
