"""What one does with a finished run: evaluate, predict, look at predictions, export. From Python too."""
