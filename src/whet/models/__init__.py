"""Models: made from nothing, loaded, adapted, taken apart and saved again."""
