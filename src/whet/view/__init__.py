"""Views: what a run left behind, drawn for a reader."""
