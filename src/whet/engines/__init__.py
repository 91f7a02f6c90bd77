"""What samples completions: one protocol, and the engines that speak it."""
