"""What the methods of this room are compared with, from the same code path."""

from cograd.machines.baselines.adom_plus import ADOMPlus
from cograd.machines.baselines.bitmap_topk import BitmapTopK
from cograd.machines.baselines.continuized import Continuized
from cograd.machines.baselines.diloco import DiLoCo, LocalAveraging
from cograd.machines.baselines.drop_slowest import DropSlowest
from cograd.machines.baselines.fetchsgd import FetchSGD
from cograd.machines.baselines.full_gradient import Backprop, FullZeroth
from cograd.machines.baselines.gradient_dropping import GradientDropping
from cograd.machines.baselines.msda import MSDA

__all__ = [
    "MSDA",
    "ADOMPlus",
    "Backprop",
    "BitmapTopK",
    "Continuized",
    "DiLoCo",
    "DropSlowest",
    "FetchSGD",
    "FullZeroth",
    "GradientDropping",
    "LocalAveraging",
]
