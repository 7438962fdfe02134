"""What this library asks of torch's autograd. Nothing here knows of tasks."""
