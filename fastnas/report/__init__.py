"""Pictures of what a search found and how it got there."""
