"""Runs on a Ray cluster: where its processes go, who starts and watches them, what happens when one is lost."""
