"""What can be known before training: settings, data, templates, models, and the memory that a run will take."""
