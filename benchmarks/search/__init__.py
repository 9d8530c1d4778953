"""Holds the cases of a search: its step, its memory, and whole searches."""
