"""Training over links that are really slow: hosts in network namespaces, links shaped by ``tc tbf``."""
