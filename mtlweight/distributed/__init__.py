"""What processes tell each other, and parameters that lie in pieces among them. Nothing here knows of tasks."""
