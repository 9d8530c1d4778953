"""Holds the layers that networks are made of, eager and fused alike, with public code's names."""
