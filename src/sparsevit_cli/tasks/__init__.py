"""What models are trained for. A task is one package here, or a class of the user's (`task`, `find`)."""
