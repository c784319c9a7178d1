"""What strangers may send, made up at random: handshake, page, FIFO lines, stack dumps."""
