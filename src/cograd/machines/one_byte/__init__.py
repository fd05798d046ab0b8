"""Just One Byte (arXiv:2306.10015): fine-tuning over a network at one byte a gradient estimate.

M machines hold the same model and their own data. Each measures the loss at theta + eps z and theta - eps z
for directions z that follow from a common seed, the round, the machine and the sample, and sends the
projected gradient p = (l+ - l-) / (2 eps) as one byte. Everyone draws everyone's z again and takes the same
step theta <- theta - (eta / n) p z for each estimate, so the replicas stay equal bit for bit, whatever the
model's size. No backward pass, no optimizer state.

- `codes`: the byte, and the codes it is compared with;
- `noise`: directions that every machine draws again, and the two halves of a step as functions;
- `log`: the run as its bytes: replay, repair, shipping;
- `optimizer`: `OneByte`, a round of a group of machines and the check that replicas are the same, and
  `LocalPeers`, all machines in one process;
- `agreement`: which machines' bytes a round uses when machines come, go and fail, as messages in and out;
- `group`: the same on sockets.
"""

from cograd.machines.one_byte.agreement import Dropped, Refused
from cograd.machines.one_byte.codes import LinearByte, LogByte, LogNibble
from cograd.machines.one_byte.group import Group
from cograd.machines.one_byte.log import Log, LogError
from cograd.machines.one_byte.optimizer import Diverged, Info, LocalPeers, OneByte

__all__ = [
    "Diverged",
    "Dropped",
    "Group",
    "Info",
    "LinearByte",
    "LocalPeers",
    "Log",
    "LogByte",
    "LogError",
    "LogNibble",
    "OneByte",
    "Refused",
]
