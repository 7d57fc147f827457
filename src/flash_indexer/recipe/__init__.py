"""The warm-up as a command runs it: data, training, processes, the record of a run."""
