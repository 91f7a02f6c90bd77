"""Data: files become rows, rows become conversations or prompts, those become tokens and masks."""
