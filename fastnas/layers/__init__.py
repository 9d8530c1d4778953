"""The layers that networks are made of, eager and fused alike, with the names of public code."""
