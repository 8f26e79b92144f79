"""One HTML page of one run's answers, or of two runs' beside each other."""
