"""Sequential gradient coding (arXiv:2211.13802): workers share coded sums, and nobody waits for the slow ones.

n workers compute parts of a job's gradient and send sums of them; a master gets the exact sum of all samples'
gradients from whichever answers come in time. Gradient coding (GC) lets each worker compute s + 1 of n chunks
and decodes from any n - s answers. Where several models are trained in turn, a gradient may come T rounds
late, and stragglers can be coded against over time: SR-SGC repeats a task that failed B rounds ago; M-SGC
retries most of the data and codes the rest, at a load near the least possible, for W - 1 + B vectors a round
instead of one.

- `codes`: what a worker sends, and the weights that decode (Sec. 3.1, GC);
- `schemes`: uncoded, GC, SR-SGC, M-SGC: tasks, straggler models, when a job is done (Sec. 3.1 to 3.3);
- `clock`: the round protocol, delays, a clock for any number of workers (Sec. 4);
- `choice`: parameters from a probe (Sec. 4);
- `learners`: the models in training, and the gradient of a chunk;
- `clusters`: workers simulated here, or real processes;
- `training`: the master's run.
"""

from cograd.machines.gradient_coding.choice import Choice, fit_slope, select
from cograd.machines.gradient_coding.clock import GilbertElliott, Timeline, Trace, run_clock
from cograd.machines.gradient_coding.clusters import MailboxCluster, SimulatedCluster, serve
from cograd.machines.gradient_coding.codes import CyclicGC, CyclicMDS, NotDecodable, RepetitionGC
from cograd.machines.gradient_coding.learners import Bench, Learner
from cograd.machines.gradient_coding.schemes import GC, MSGC, SRSGC, DeadlineMissed, MiniTask, Uncoded
from cograd.machines.gradient_coding.training import GradientCoding

__all__ = [
    "GC",
    "MSGC",
    "SRSGC",
    "Bench",
    "Choice",
    "CyclicGC",
    "CyclicMDS",
    "DeadlineMissed",
    "GilbertElliott",
    "GradientCoding",
    "Learner",
    "MailboxCluster",
    "MiniTask",
    "NotDecodable",
    "RepetitionGC",
    "SimulatedCluster",
    "Timeline",
    "Trace",
    "Uncoded",
    "fit_slope",
    "run_clock",
    "select",
    "serve",
]
