"""The mathematics: tensors and numbers in, new tensors out. Importing it imports nothing else."""
