"""How a watcher process is launched, found, and kept: `hangwatch serve`."""
