"""From the files of other tools to a configuration of ours: they are read, never run."""
