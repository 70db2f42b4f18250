"""Training on Ray Train: DeepSpeed ranks as Ray workers, restarted when one dies; and several arms of an experiment."""
