"""Processes that train one model together: how they meet, who leads, how a batch is divided, what happens on a loss."""
