"""How parties run and reach each other: in one process, on DistributedDataParallel, in worker processes."""
