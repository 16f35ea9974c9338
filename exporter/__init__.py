"""From a checkpoint to a bundle: one traced step, split into three graphs, counted, verified; and `cat-export`."""
