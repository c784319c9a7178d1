"""What runs inside a worker: its page, its connection, its stack channel."""
