"""What once went wrong, or could have, step by step: no chance, no seed that a change of the
generator would make mean something else."""
