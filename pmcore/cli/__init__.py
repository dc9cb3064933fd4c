"""The command line. One file a command; rendering lives here and nowhere else."""
