"""cograd: autograd computes gradients; cograd shares them.

The library is arranged by who shares: ``cograd.machines``, and further rooms as they are built.
``cograd.core`` holds what every room stands on.
"""

__version__ = "0.1.0"
