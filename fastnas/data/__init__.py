"""Reads images, splits and augments them, and hands out batches."""
