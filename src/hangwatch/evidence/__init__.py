"""What is written down of a hang; it runs in a process of its own, with a deadline."""
