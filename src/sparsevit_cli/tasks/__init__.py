"""What is trained: a task brings loss and metric."""
