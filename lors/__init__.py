"""LoRS-Merging for multilingual speech models: task vectors, low-rank and sparse pruning, merging, evaluation."""
