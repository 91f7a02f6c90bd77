"""Plans of runs on machines that need not be there: memory, time, the layout that fits best."""
